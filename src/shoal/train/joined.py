"""Training as one of the ranks that torchrun or Slurm has started.

There is no supervisor of ours: rank 0 keeps the run folder and shows progress, every rank hears
signals itself, and each rank's own failure is its own to print.
"""

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import Any

from shoal import report
from shoal.cluster import Cluster
from shoal.env import World
from shoal.errors import PeerLost, RankLost, RunError, ShoalError
from shoal.job import Resolved
from shoal.launch import Context, described, joined_context
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.train.ended import Ended, after_start
from shoal.train.folder import Options, failed, finish, open_run, replayed, start, write_report
from shoal.train.rank import Task, train_on_rank

LAST_WORDS_S = 2.0  # how long rank 0 waits for a lost rank's reason to appear in the run folder


def train_joined(
    world: World,
    recipe: Recipe,
    resolved: Resolved,
    cluster: Cluster,
    options: Options,
    stop_requested: threading.Event,
) -> Ended:
    """Be one rank of the world. Rank 0 writes the run folder; all know how the run ended.

    Raises a `ShoalError` on each rank for what is found before there is a run.
    """
    with contextlib.ExitStack() as stack:
        show: Any = _silent
        if world.rank == 0:
            show = stack.enter_context(report.live.view(sys.stderr, verbose=options.verbose)).show
        context = joined_context(world, resolved.threads, show, stop_requested)
        part = _Part(context, recipe, resolved, cluster, options)
        return part.train(stack)


class _Part:
    """One rank's part of a joined run."""

    def __init__(
        self,
        context: Context,
        recipe: Recipe,
        resolved: Resolved,
        cluster: Cluster,
        options: Options,
    ) -> None:
        self._context = context
        self._recipe = recipe
        self._resolved = resolved
        self._cluster = cluster
        self._options = options
        self._run: Run | None = None
        self._start_message: dict[str, Any] = {}
        self._began = time.time()

    def train(self, stack: contextlib.ExitStack) -> Ended:
        """Meet the others, then train; rank 0 opens the run's folder once they have met."""

        def open_folder() -> Path:
            run = self._run = open_run(self._recipe, self._options)
            stack.enter_context(run.lock())
            start(run, self._recipe, self._resolved, self._cluster, resume=self._options.resume)
            for reason in self._resolved.reasons:
                self._context.send({"kind": "event", "event": "choice", "message": reason})
            return run.path

        task = Task(
            recipe=self._recipe.to_dict(),
            strategy=str(self._resolved.strategy),
            device=self._resolved.device,
            run=None,
            resume=self._options.resume,
            transport=self._options.transport,
            replay=replayed(self._options),
        )
        try:
            summary = train_on_rank(self._context, task, open_folder, self._opened)
        except Exception as error:
            return self._failed(described(error, self._context.rank))
        return self._ended(summary)

    def _opened(self, run: Run) -> None:
        if self._run is None:  # rank 0 keeps the path as it was given
            self._run = run

    def _ended(self, summary: dict[str, Any]) -> Ended:
        assert self._run is not None  # it has a summary
        status = 75 if summary["state"] == "stopped" else 0
        if self._context.rank != 0:
            return Ended(self._run, summary, status, tells=False)
        document = finish(self._run, self._resolved, summary)
        if self._options.tell_end:
            self._context.send({"kind": "end", **document})
        warning = write_report(self._run)
        if warning is not None:
            self._context.send({"kind": "event", "event": "warning", "message": warning})
        return Ended(self._run, document, status)

    def _failed(self, error: ShoalError) -> Ended:
        """Write down a failure: rank 0 in the document, any other for rank 0 to find."""
        if self._run is None:
            raise error
        if self._context.rank != 0:
            if not isinstance(error, PeerLost):
                with contextlib.suppress(OSError, ShoalError):
                    self._run.log_event("fault", error.message, error.rank, error.step, error.phase)
            return Ended(self._run, {}, after_start(error), error)
        cause = self._cause(self._run, error) if isinstance(error, PeerLost) else error
        # Whose own error it is, logs and tells it; where a rank left without a word, rank 0 does.
        told_there = isinstance(error, PeerLost) and not isinstance(cause, RankLost)
        document = failed(self._run, self._resolved, cause, self._start_message, logged=told_there)
        write_report(self._run)
        return Ended(self._run, document, after_start(cause), error if told_there else cause)

    def _cause(self, run: Run, lost: PeerLost) -> ShoalError:
        """The first reason that another rank gives in the run folder, soon after it is lost."""
        deadline = time.monotonic() + LAST_WORDS_S
        while time.monotonic() < deadline:
            with contextlib.suppress(ShoalError):
                for event in run.events():
                    if event["event"] == "fault" and event["time"] >= self._began:
                        return RunError(
                            event["message"],
                            rank=event["rank"],
                            step=event["step"],
                            phase=event["phase"],
                        )
            time.sleep(0.05)
        return RankLost(f"another rank has left without a word: {lost.message}", step=lost.step)


def _silent(_message: dict[str, Any]) -> None:
    return
