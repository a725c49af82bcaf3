"""`train` with all its options: settle, start the ranks, check, remember the run.

    here                 ranks
    resolve        ──▶   started: they import torch
    check, task    ──▶   train_on_rank × n
    live view      ◀──   messages of rank 0
    run.json, report ◀── summary of rank 0, or the first failure

With ``WORLD_SIZE`` set (torchrun, Slurm) no ranks are started: this process is one of them.
"""

import contextlib
import signal
import sys
from collections.abc import Callable
from typing import Any

from shoal import env, report
from shoal.cluster import Cluster
from shoal.errors import RankLost, ShoalError, Stopped
from shoal.job import Remembered, Resolved, as_begun, resolve, settled, tried_of
from shoal.launch import Ranks, stop_signals_heard
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Async, Strategy
from shoal.train.ahead import Begun, begun
from shoal.train.document import known
from shoal.train.ended import Ended, after_start
from shoal.train.entry import run_on_rank, try_on_rank
from shoal.train.folder import (
    Options,
    drop_half_written,
    ended_at_once,
    failed,
    finish,
    open_run,
    replayed,
    start,
    write_report,
)

Show = Callable[[dict[str, Any]], None]


def train_with(
    recipe: Recipe,
    strategy: str | Strategy,
    cluster: Cluster | None,
    options: Options,
    begin: Begun | None = None,
) -> Ended:
    """:func:`shoal.train` with every option of the command line; ``begin``: what has begun already.

    Raises a `ShoalError` for what is found before there is a run; what it returns has later ones.
    """
    world = env.torchrun_world()
    if world is not None:
        with stop_signals_heard() as stop_requested:
            cluster = cluster or Cluster.local()
            resolved = resolve(recipe, strategy, cluster, world=world)
            _check(recipe)
            from shoal.train.joined import train_joined  # torch, once all else is in order

            return train_joined(world, recipe, resolved, cluster, options, stop_requested)
    with begun() if begin is None else contextlib.nullcontext(begin) as started:
        assert started is not None  # nobody else's ranks are there
        cluster = cluster or Cluster.local()
        resolved = resolve(recipe, strategy, cluster)
        started.ahead.start(resolved.strategy.world_size, resolved.threads)
        _check(recipe)
        run = open_run(recipe, options)
        if options.resume and resolved.free and any(run.checkpoints_path.glob("step-*")):
            resolved = as_begun(resolved, run.strategy)
        with run.lock(), report.live.view(sys.stderr, verbose=options.verbose) as view:
            front = _Front(run, recipe, resolved, options, started, view.show)
            return front.train(cluster)


def _check(recipe: Recipe) -> None:
    from shoal.job import check_before_start  # numpy, while the ranks import torch

    check_before_start(recipe)


class _Front:
    """One run, as the process that has started its ranks sees it."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        resolved: Resolved,
        options: Options,
        started: Begun,
        show: Show,
    ) -> None:
        self._run = run
        self._recipe = recipe
        self._resolved = resolved
        self._options = options
        self._ahead = started.ahead
        self._signals = started.signals
        self._show = show
        self._start_message: dict[str, Any] = {}
        self._stop_told = False
        self._ranks_started = False
        way, size = resolved.strategy.agreement, resolved.strategy.world_size
        self._expendable = way.expendable(size) if isinstance(way, Async) else ()
        self._ranks_met = False  # they are past their start, where all are needed
        self._rejoins: list[dict[str, Any]] = []  # what is told of it once the ranks are there

    def train(self, cluster: Cluster) -> Ended:
        """The run from its first file to its report."""
        run = self._run
        try:
            start(run, self._recipe, self._resolved, cluster, resume=self._options.resume)
            for reason in self._resolved.reasons:
                self._show({"kind": "event", "event": "choice", "message": reason})
            summary = self._supervise(Remembered.of(self._recipe, self._resolved, cluster))
            document = finish(run, self._resolved, summary)
        except ShoalError as error:
            drop_half_written(run)
            document = failed(run, self._resolved, error, self._start_message)
            status = after_start(error) if self._ranks_started else error.exit_status
            ended = Ended(run, document, status, error)
        except SystemExit as second:  # a second signal: the ranks are gone
            return self._ended_at_once(int(str(second.code)))
        else:
            if self._options.tell_end:
                self._show({"kind": "end", **document})
            ended = Ended(run, document, 75 if document["state"] == "stopped" else 0)
        self._warn(write_report(run))
        return ended

    def _supervise(self, trials: Remembered) -> dict[str, Any]:
        """Run the ranks to the end; the policy on a rank's death: end, or start again."""
        restarts, resume, saved = 0, self._options.resume, self._newest()
        while True:
            try:
                summary = self._run_ranks(resume, trials)
                if summary["state"] != "rejoin":
                    return summary
                if self._signals.heard:
                    return {**summary, "state": "stopped", "reason": "asked to stop by a signal"}
                resume = True
                self._rejoin(summary["steps"])
            except RankLost as error:
                spare = error.rank in self._expendable and self._newest() > saved
                if self._signals.heard or (restarts == self._options.max_restarts and not spare):
                    raise
                restarts, resume, saved = restarts + (not spare), True, self._newest()
                who = f"{error.where}: " if error.where else ""
                message = f"{who}{error.message}; starting again from the newest checkpoint"
                self._run.log_event("recovery", message, error.rank)
                self._show({"kind": "event", "event": "recovery", "message": message})

    def _newest(self) -> int:
        """The step of the newest checkpoint; -1 without one."""
        found = (each.name for each in self._run.checkpoints_path.glob("step-*"))
        return max((int(name.removeprefix("step-")) for name in found), default=-1)

    def _rejoin(self, step: int) -> None:
        """A worker has died, and the others have saved what there is: start all ranks anew."""
        lost: list[dict[str, Any]] = []
        for event in self._run.events():
            lost = [] if event["event"] == "rejoined" else lost
            lost += [event] if event["event"] == "lost" else []
        for event in lost:
            message = f"it had died at step {event['step']}, and rejoins at step {step}"
            told = {"kind": "event", "event": "rejoined", "rank": event["rank"]}
            self._rejoins.append({**told, "message": message, "step": step})

    def _run_ranks(self, resume: bool, trials: Remembered) -> dict[str, Any]:
        task = {
            "recipe": self._recipe.to_dict(),
            "strategy": str(self._resolved.strategy),
            "device": self._resolved.device,
            "run": str(self._run.path.resolve()),
            "resume": resume,
            "transport": self._options.transport,
            "replay": replayed(self._options),
        }
        self._ranks_started, self._ranks_met = True, False
        with self._ahead.take(self._resolved.strategy.world_size, self._resolved.threads) as ranks:
            if self._resolved.tries:
                self._settle(ranks, task, trials)
            results = ranks.call(
                run_on_rank,
                task,
                on_message=lambda _rank, message: self._hear(message),
                on_signal="pass on",
                signals=self._signals,
                spared=self._spared if self._expendable else None,
            )
        summary: dict[str, Any] = results[0]
        return summary

    def _settle(self, ranks: Ranks, task: dict[str, Any], trials: Remembered) -> None:
        """Choose among numerics that the ranks try, or have tried before, and write it down."""
        tried, reason = trials.load(), None
        if tried is None:
            outcome = ranks.call(try_on_rank, task, on_signal="pass on", signals=self._signals)[0]
            tried, reason = tried_of(outcome), outcome["reason"]
            if outcome["complete"]:
                trials.save(tried)
        self._resolved = settled(self._resolved, tried, reason)
        task["strategy"] = str(self._resolved.strategy)
        self._resolved.strategy.write(self._run.path / "strategy.json")
        said = self._resolved.reasons[-1]
        self._run.log_event("choice", said)
        self._run.write_summary(known(self._run, self._resolved))
        self._show({"kind": "event", "event": "choice", "message": said})

    def _hear(self, message: dict[str, Any]) -> None:
        if message.get("kind") == "start":
            self._start_message = message
            self._ranks_met = True
            self._tell_of_rejoining()
        if self._signals.heard and not self._stop_told:
            self._stop_told = True
            name = signal.Signals(self._signals.heard[0]).name
            text = f"{name}: saving, then stopping (a second signal ends the run at once)"
            self._show({"kind": "event", "event": "signal", "message": text})
        self._show(message)

    def _spared(self, rank: int) -> bool:
        return self._ranks_met and rank in self._expendable

    def _tell_of_rejoining(self) -> None:
        rejoins, self._rejoins = self._rejoins, []
        for told in rejoins:
            self._run.log_event("rejoined", told["message"], told["rank"], told["step"])
            self._show(told)

    def _warn(self, message: str | None) -> None:
        if message is not None:
            self._show({"kind": "event", "event": "warning", "message": message})

    def _ended_at_once(self, status: int) -> Ended:
        error = Stopped(f"ended at once by a second signal, {signal.Signals(status - 128).name}")
        drop_half_written(self._run)
        document = ended_at_once(self._run, self._resolved, error.message)
        return Ended(self._run, document, status, error)
