"""What verbs share: the one JSON document, the one error, the exit status."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import typer


def print_document(document: dict[str, Any]) -> None:
    """The one document of `--json`, on standard output."""
    sys.stdout.write(json.dumps(_plain(document), indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


@contextlib.contextmanager
def errors_shown(debug: bool, *, as_json: bool) -> Iterator[None]:
    """Show a `ShoalError` on one screen, and leave with its exit status.

    With `--json` standard output has one document all the same: ``{"error": {…}}``.
    """
    from shoal.errors import ShoalError

    try:
        yield
    except ShoalError as error:
        leave(error, debug, document={"error": error.to_json()} if as_json else None)


def leave(error: Exception, debug: bool, document: dict[str, Any] | None = None) -> NoReturn:
    """Print the error (and the document), and leave with the error's exit status."""
    from shoal import env, report
    from shoal.errors import PeerLost, ShoalError

    assert isinstance(error, ShoalError)
    world = env.torchrun_world_or_none()
    if world is not None:
        _leave_joined(error, world.rank, isinstance(error, PeerLost))
    report.show_error(error, sys.stderr, debug)
    if document is not None:
        if not debug and "error" in document:
            document["error"].pop("traceback", None)
        print_document(document)
    if world is not None:
        # No destructors: a process group may wait for ranks that will never answer.
        sys.stderr.flush()
        os._exit(error.exit_status)
    raise typer.Exit(error.exit_status)


def _leave_joined(error: Any, rank: int, secondary: bool) -> None:
    """Under torchrun each rank is a process of its own: only the one concerned speaks."""
    told_by = 0 if error.rank is None else error.rank
    if secondary or told_by != rank:
        os._exit(error.exit_status)
