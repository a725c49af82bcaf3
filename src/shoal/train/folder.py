"""What the front of a run does with its folder: open it, and write down how the run stands."""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import report
from shoal.cluster import Cluster
from shoal.errors import RunFolderError, ShoalError
from shoal.job import Resolved
from shoal.recipe import Recipe
from shoal.run import Run, newest_unfinished

ROOT = Path("runs")


@dataclass(frozen=True)
class Options:
    """How a run is started, beside recipe and strategy."""

    out: Path | None = None
    resume: bool = False
    max_restarts: int = 0
    verbose: bool = False


def open_run(recipe: Recipe, options: Options) -> Run:
    """A new run folder, or with `resume` the one to go on with. Raises `RunFolderError`."""
    if not options.resume:
        if options.out is None:
            return Run.create(ROOT, recipe.name)
        _refuse_other(options.out, recipe)
        return Run.create_at(options.out)
    if options.out is None:
        run = newest_unfinished(ROOT, recipe.name)
    else:
        run = Run.open(options.out)
    _require_same(run, recipe)
    return run


def _refuse_other(path: Path, recipe: Recipe) -> None:
    """Say whose run a folder holds, where `Run.create_at` would only say that it is not empty."""
    try:
        there = Run.open(path)
    except RunFolderError:
        return
    if there.recipe.fingerprint == recipe.fingerprint:
        whose, hint = "this recipe", "Go on with it with --resume, or give another --out."
    else:
        whose, hint = f"another recipe ({there.recipe.name!r})", "Give another folder with --out."
    raise RunFolderError(f"{path} holds a run of {whose}", hint=hint)


def _require_same(run: Run, recipe: Recipe) -> None:
    differences = recipe.differences(run.recipe)
    if differences:
        raise RunFolderError(
            f"{run.path} is a run of another recipe:\n  " + "\n  ".join(differences[:8]),
            hint="Resume with the recipe that the run was started with, or start a new run "
            "without --resume.",
        )


def start(run: Run, recipe: Recipe, resolved: Resolved, cluster: Cluster, *, resume: bool) -> None:
    """Write the inputs and that the run is going on."""
    if not resume:
        run.write_inputs(recipe, resolved.strategy, cluster)
    run.checkpoints_path.mkdir(exist_ok=True)
    run.log_event("start", f"{'resumed' if resume else 'started'} with {resolved.strategy}")
    run.write_summary(_known(run, resolved))


def finish(run: Run, resolved: Resolved, summary: dict[str, Any]) -> None:
    """Write how the run ended, and its report."""
    run.log_event(summary["state"], str(summary.get("reason", "")), step=summary.get("steps"))
    run.write_summary({**_known(run, resolved), **summary})
    report.write_run_report(run.path)


def failed(run: Run, resolved: Resolved, error: ShoalError) -> None:
    """Write down a failure; what cannot be written must not hide its cause."""
    newest = max(run.checkpoints_path.glob("step-*"), default=None)
    told = {key: value for key, value in error.to_json().items() if key != "traceback"}
    with contextlib.suppress(OSError, ShoalError):
        run.log_event("fault", error.message, error.rank, error.step, error.phase)
        run.write_summary(
            {
                **_known(run, resolved),
                "state": "failed",
                "reason": error.message,
                "error": told,
                "checkpoint": str(newest) if newest is not None else None,
            }
        )
        report.write_run_report(run.path)


def _known(run: Run, resolved: Resolved) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "state": "running",
        "strategy": resolved.strategy.resolved(),
        "world_size": resolved.strategy.world_size,
        "device": resolved.device,
        "choices": list(resolved.reasons),
        "command": sys.argv,
    }
