"""The document of a run, at any moment of it: every key of the contract, from the first on.

known(run, resolved)                        before anything has happened
{**known(…), **summary}                     at the end, with what the ranks say
so_far(run)                                 after a failure, from the lines of the log
"""

import contextlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shoal.errors import ShoalError
from shoal.job import Resolved
from shoal.run import Run


def known(run: Run, resolved: Resolved) -> dict[str, Any]:
    """What is known of a run that has begun; nothing has been done yet."""
    return {
        "run": str(run.path),
        "state": "running",
        "strategy": resolved.strategy.resolved(),
        "world_size": resolved.strategy.world_size,
        "device": resolved.device,
        "choices": list(resolved.reasons),
        "split": [],
        "command": sys.argv,
        "steps": 0,
        "samples": 0,
        "seconds": 0.0,
        "samples_per_second": 0.0,
        "metrics": {},
        "peak_memory_bytes": [],
        "comm": None,
        "comm_bytes": {},
        "timings": {},
        "versions": versions(),
        "checkpoint": None,
        "resumed_from_step": None,
    }


def versions() -> dict[str, str]:
    """What computes: versions of Shoal, torch and Python. Imports no torch."""
    import platform

    from shoal.version import __version__

    with contextlib.suppress(PackageNotFoundError):
        return {
            "shoal": __version__,
            "torch": version("torch"),
            "python": platform.python_version(),
        }
    return {"shoal": __version__, "torch": "unknown", "python": platform.python_version()}


def so_far(run: Run) -> dict[str, Any]:
    """Steps, samples, time, speed and metrics of the last logged lines; the newest checkpoint."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ShoalError):  # the cause of the failure matters more
        for line in run.metrics():
            if "evaluation" in line:
                found["metrics"] = line["evaluation"]
            else:
                found.update(
                    steps=line["step"],
                    samples=line["samples"],
                    seconds=line["seconds"],
                    samples_per_second=line["samples_per_second"],
                )
    newest = max(run.checkpoints_path.glob("step-*"), default=None)
    return {**found, "checkpoint": None if newest is None else str(newest)}


def placed(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
    """The ranks' summary with paths as the run's own was given: relative where that was."""
    checkpoint = summary.get("checkpoint")
    if checkpoint is None:
        return summary
    return {**summary, "checkpoint": str(run.checkpoints_path / Path(checkpoint).name)}
