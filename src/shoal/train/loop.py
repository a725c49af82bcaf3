"""The loop of a run on one rank: steps, evaluations, commits, until done or stopped."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.job import Job
from shoal.predict import evaluate
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.train.clock import Every, Stopwatch
from shoal.train.commit import Committer
from shoal.train.step import Flags, StepResult, train_step
from shoal.train.stop import Convergence

LOGGED_STEPS = 2000  # at most so many lines of training in metrics.jsonl
SHOWN_EVERY_S = 0.1


@dataclass
class Outcome:
    """How the loop ended."""

    state: str  # "done" or "stopped"
    reason: str
    steps: int
    metrics: dict[str, float]


class Loop:
    """Drives one job. ``send`` carries messages to the live view; rank 0 writes the run folder."""

    def __init__(
        self,
        job: Job,
        recipe: Recipe,
        run: Run,
        strategy: str,
        send: Callable[[dict[str, Any]], None],
        stop_requested: Callable[[], bool],
    ) -> None:
        self.job = job
        self.recipe = recipe
        self.run = run
        self.is_first = job.groups.world.rank == 0
        self._send = send if self.is_first else _ignore
        self._stop_requested = stop_requested
        feed = job.workload.feed
        self.total = job.workload.total_steps
        self.watch = Stopwatch()
        self._evaluate_every = Every(recipe.evaluate.every, feed.steps_per_epoch)
        self._checkpoint_every = Every(recipe.checkpoint.every, feed.steps_per_epoch)
        self.convergence = Convergence(recipe.stop.metric if recipe.stop else "loss")
        self.committer = Committer(job, recipe, run, strategy, self._send)
        self.metrics: dict[str, float] = {}
        self._log_every = max(1, math.ceil(self.total / LOGGED_STEPS))
        self._started = time.monotonic()
        self._shown = 0.0
        self.bad_examples = 0
        self._since: tuple[float, float] = (0.0, 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run, earlier parts of a resumed one included."""
        return time.monotonic() - self._started

    def resume(self, train: dict[str, Any]) -> None:
        """Go on from a checkpoint's early-stop state and clock."""
        self.convergence.restore(train)
        self._started = time.monotonic() - float(train.get("seconds", 0.0))

    def run_to_end(self) -> Outcome:
        """Train from the job's next step on. Collective."""
        step = self.job.next_step
        self.watch.lap("start_up")
        stopping, reason = False, None
        # Asked to stop before the first step: the ranks agree in a step, so do that one.
        while step < self.total and not stopping and reason is None:
            result = train_step(self.job, step, self._flags())
            step += 1
            self.watch.lap("step")
            stopping = result.flags.stop > 0
            self.bad_examples += int(result.flags.bad_examples)
            self._note(step, result)
            last = step == self.total
            best = False
            if last or self._evaluate_every.due(step, result.flags.evaluation_due):
                best = self._evaluate(step, result)
                reason = self._converged(step)
            ends = last or stopping or reason is not None
            if self._checkpoint_every.due(step, result.flags.checkpoint_due) or best or ends:
                self.committer.commit(step, self.convergence, self.elapsed)
                self.watch.lap("checkpoint")
        if stopping and step < self.total and reason is None:
            return Outcome("stopped", "asked to stop by a signal", step, self.metrics)
        return Outcome("done", reason or "all steps done", step, self.metrics)

    def _flags(self) -> Flags:
        return Flags(
            stop=float(self._stop_requested()),
            checkpoint_due=float(self.is_first and self._checkpoint_every.clock_says()),
            evaluation_due=float(self.is_first and self._evaluate_every.clock_says()),
        )

    def _converged(self, step: int) -> str | None:
        per_epoch = self.job.workload.feed.steps_per_epoch
        return self.convergence.exhausted(step, self.recipe.stop, per_epoch)

    def _evaluate(self, step: int, result: StepResult) -> bool:
        """Evaluate after `step` steps; whether it is the best so far."""
        # Without an evaluation set, what there is to judge by is the training loss.
        self.metrics = evaluate(self.job) or {"loss": result.loss}
        self.watch.lap("evaluation")
        if self.is_first:
            self.run.log_metrics({**self._place(step), "evaluation": self.metrics})
        epoch = self._place(step)["epoch"]
        self._send(
            {"kind": "evaluation", "step": step, "epoch": epoch, "metrics": self.metrics}
        )
        return self.convergence.observe(step, self.metrics)

    def _place(self, step: int) -> dict[str, Any]:
        feed = self.job.workload.feed
        samples = self.job.workload.samples_before(step)
        return {
            "step": step,
            "epoch": round(samples / feed.examples, 4),
            "samples": samples,
            "seconds": round(self.elapsed, 4),
        }

    def _note(self, step: int, result: StepResult) -> None:
        """Log and show a step, where there is reason to."""
        now = time.monotonic()
        logged = step % self._log_every == 0 or step == self.total
        shown = now - self._shown >= SHOWN_EVERY_S or step == self.total
        if not self.is_first or not (logged or shown):
            return
        line = {
            **self._place(step),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "samples_per_second": self._rate(step),
        }
        if logged:
            self.run.log_metrics(line)
        if shown:
            self._shown = now
            self._send({"kind": "step", **line})

    def _rate(self, step: int) -> float:
        """Samples per second of training time since the last time that this was asked."""
        samples = float(self.job.workload.samples_before(step))
        seconds = self.watch.seconds.get("step", 0.0)
        before_samples, before_seconds = self._since
        if not before_seconds:
            before_samples = float(self.job.workload.samples_before(self.job.next_step))
        self._since = (samples, seconds)
        return round((samples - before_samples) / max(seconds - before_seconds, 1e-9), 2)


def _ignore(_message: dict[str, Any]) -> None:
    return
