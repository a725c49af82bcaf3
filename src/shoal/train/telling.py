"""What is cut and why, told at the start of a run: in short, and to who asks all of it.

    lines = split_of(job)                  # the same on all ranks: they compare it
    tell(lines, run, send)                 # rank 0: one line to all, the rest with --verbose

All lines are in ``run.json`` under ``split``; the short one and warnings in ``events.jsonl``.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from shoal.job import Job
from shoal.run import Run

WARNING = "warning: "
_SHORT = re.compile(r"(pipeline|tensor|zero[123]): ")


def split_of(job: Job) -> tuple[str, ...]:
    """What is cut and why, a line each; empty for whole replicas."""
    describe: Callable[[], tuple[str, ...]] | None = getattr(job.replica, "describe", None)
    return describe() if describe is not None else ()


def tell(lines: Sequence[str], run: Run, send: Callable[[dict[str, Any]], None]) -> None:
    """Log and show the first line of each kind as one, and warnings; send the others as details."""
    if not lines:
        return
    kinds: dict[str, str] = {}
    for line in lines:
        if (found := _SHORT.match(line)) is not None:
            kinds.setdefault(found[1], line)
    _event("choice", "; ".join(kinds.values()) or "all is whole on each rank", run, send)
    for line in lines:
        if line.startswith(WARNING):
            _event("warning", line.removeprefix(WARNING), run, send)
        elif line not in kinds.values():
            send({"kind": "event", "event": "split", "message": line, "detail": True})


def _event(event: str, message: str, run: Run, send: Callable[[dict[str, Any]], None]) -> None:
    run.log_event(event, message)
    send({"kind": "event", "event": event, "message": message})
