"""What verbs share: the one JSON document, the one error, the exit status."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import typer

if TYPE_CHECKING:
    from shoal.errors import ShoalError


def print_document(document: dict[str, Any]) -> None:
    """The one document of `--json`, on standard output."""
    if sys.stdout is None:  # it was closed before this process began
        return
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
def output_kept() -> Iterator[None]:
    """Send to standard error what is printed in this block, by whomever: user code, C, children.

    Standard output belongs to the one document, which is printed afterwards.
    """
    if sys.stdout is None:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def errors_shown(debug: bool, *, as_json: bool) -> Iterator[None]:
    """Show a `ShoalError` on one screen, and leave with its exit status.

    With `--json` standard output has one document all the same: ``{"error": {…}}``.
    """
    from shoal.errors import ShoalError

    try:
        yield
    except ShoalError as error:
        leave(error, error.exit_status, debug, {"error": _told(error, debug)}, as_json=as_json)


def _told(error: "ShoalError", debug: bool) -> dict[str, Any]:
    said = error.to_json()
    return said if debug else {key: each for key, each in said.items() if key != "traceback"}


def leave(
    error: "ShoalError", status: int, debug: bool, document: dict[str, Any], *, as_json: bool
) -> NoReturn:
    """Show the error and where the run is, print the document if asked, and leave with `status`.

    Under torchrun each rank is a process of its own: the one concerned shows the error, and rank 0
    has the document.
    """
    from shoal import env
    from shoal.errors import PeerLost

    world = env.torchrun_world_or_none()
    first = world is None or world.rank == 0
    concerned = world is None or error.rank == world.rank
    if world is not None and error.rank is None:
        # Found before the ranks met: on a host by all of its ranks alike.
        concerned = world.local_rank == 0
    if concerned and not isinstance(error, PeerLost):
        _show(error, debug, document if first else {})
    if as_json and first:
        print_document(document)
    if world is not None:
        # No destructors: a process group may wait for ranks that will never answer.
        sys.stderr.flush()
        os._exit(status)
    raise typer.Exit(status)


def _show(error: "ShoalError", debug: bool, document: dict[str, Any]) -> None:
    from shoal import report

    report.show_error(error, sys.stderr, debug)
    if "run" in document:
        # Result and speed come before the folder: the error stands in their place.
        lines = report.summary_lines(document).splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("run "))
        sys.stderr.write("".join(f"{line}\n" for line in lines[first:]))
