"""What the front of a run does with its folder: open it, and write down how the run stands."""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import report
from shoal.cluster import Cluster
from shoal.errors import RunFolderError, ShoalError
from shoal.job import Resolved
from shoal.recipe import Recipe
from shoal.run import Run, newest_unfinished
from shoal.train.document import known, placed, so_far

ROOT = Path("runs")


@dataclass(frozen=True)
class Options:
    """How a run is started, beside recipe and strategy."""

    out: Path | None = None
    resume: bool = False
    max_restarts: int = 0
    verbose: bool = False
    tell_end: bool = False  # with a line among those of the progress
    replay: Path | None = None  # the ledger of an asynchronous run, to be followed
    transport: str = "auto"  # between ranks: auto, shared_memory, gloo


def replayed(options: Options) -> str | None:
    """The ledger that a run follows, wherever its ranks are started."""
    return None if options.replay is None else str(options.replay.resolve())


def open_run(recipe: Recipe, options: Options) -> Run:
    """A new run folder, or with `resume` the one to go on with. Raises `RunFolderError`."""
    if not options.resume:
        if options.out is None:
            return Run.create(ROOT, recipe.name)
        _refuse_other(options.out, recipe)
        return Run.create_at(options.out)
    run = newest_unfinished(ROOT, recipe.name) if options.out is None else Run.open(options.out)
    _require_same(run, recipe)
    _require_unfinished(run)
    return run


def _refuse_other(path: Path, recipe: Recipe) -> None:
    """Say whose run a folder holds, where `Run.create_at` would only say that it is not empty."""
    try:
        there = Run.open(path)
    except RunFolderError:
        return
    with there.lock():  # in use: that comes first
        theirs = there.recipe
    if theirs.fingerprint == recipe.fingerprint:
        whose, hint = "this recipe", "Go on with it with --resume, or give another --out."
    else:
        whose, hint = f"another recipe ({theirs.name!r})", "Give another folder with --out."
    raise RunFolderError(f"{path} holds a run of {whose}", hint=hint)


def _require_same(run: Run, recipe: Recipe) -> None:
    differences = recipe.differences(run.recipe)
    if differences:
        raise RunFolderError(
            f"{run.path} is a run of another recipe:\n  " + "\n  ".join(differences[:8]),
            hint="Resume with the recipe that the run was started with, or start a new run "
            "without --resume.",
        )


def _require_unfinished(run: Run) -> None:
    summary = run.summary
    if summary.get("state") == "done":
        raise RunFolderError(
            f"{run.path} is done after {summary.get('steps')} steps: nothing is left to go on with",
            hint="To train longer, start a new run without --resume, with more epochs or steps.",
        )


def start(run: Run, recipe: Recipe, resolved: Resolved, cluster: Cluster, *, resume: bool) -> None:
    """Write the inputs and that the run is going on.

    A resumed run is that of the recipe and the strategy that it goes on with.
    """
    run.write_inputs(recipe, resolved.strategy, cluster)
    run.checkpoints_path.mkdir(exist_ok=True)
    run.log_event("start", f"{'resumed' if resume else 'started'} with {resolved.strategy}")
    run.write_summary(known(run, resolved))


def finish(run: Run, resolved: Resolved, summary: dict[str, Any]) -> dict[str, Any]:
    """Write how the run ended, and its report; the run's document."""
    run.log_event(summary["state"], str(summary.get("reason", "")), step=summary.get("steps"))
    document = {**known(run, resolved), **placed(run, summary)}
    run.write_summary(document)
    return document


def failed(
    run: Run,
    resolved: Resolved,
    error: ShoalError,
    start_message: dict[str, Any],
    *,
    logged: bool = False,
) -> dict[str, Any]:
    """Write down a failure as far as that is possible; the run's document in any case.

    ``start_message``: what rank 0 said when it began; ``logged``: the event is written already.
    """
    told = {key: value for key, value in error.to_json().items() if key != "traceback"}
    document = {
        **known(run, resolved),
        **so_far(run),
        "state": "failed",
        "reason": error.message,
        "error": told,
        "resumed_from_step": start_message.get("resumed_from_step"),
        "split": start_message.get("split", []),
    }
    # What cannot be written must not hide why: the disk may be full.
    with contextlib.suppress(OSError, ShoalError):
        if not logged:
            run.log_event("fault", error.message, error.rank, error.step, error.phase)
    with contextlib.suppress(OSError, ShoalError):
        run.write_summary(document)
    return document


def ended_at_once(run: Run, resolved: Resolved, reason: str) -> dict[str, Any]:
    """Write down that a second signal has ended the run where it stood; the run's document."""
    document = {**known(run, resolved), **so_far(run), "state": "stopped", "reason": reason}
    with contextlib.suppress(OSError, ShoalError):
        run.write_summary(document)
    return document


def drop_half_written(run: Run) -> None:
    """Remove what ranks that are gone were writing; the next save would do so otherwise."""
    for path in run.checkpoints_path.glob(".step-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def write_report(run: Run) -> str | None:
    """Write the run's report; why it could not be written, as that is no reason to fail."""
    try:
        report.write_run_report(run.path)
    except (OSError, ShoalError) as error:
        said = error.message if isinstance(error, ShoalError) else str(error)
        return f"the report could not be written: {said}"
    return None
