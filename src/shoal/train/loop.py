"""The loop of a run on one rank: steps, evaluations, commits, until done or stopped."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shoal.errors import PeerLost
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.train.bad_examples import BadExamples
from shoal.train.clock import Every, Stopwatch
from shoal.train.commit import Committer
from shoal.train.located import located
from shoal.train.step import Flags, StepResult
from shoal.train.stop import Convergence
from shoal.train.team import Team
from shoal.train.times import StepTimes

LOGGED_STEPS = 2000  # at most so many lines of training in metrics.jsonl
SHOWN_EVERY_S = 0.25  # as often as the bar is drawn


@dataclass
class Outcome:
    """How the loop ended.

    ``state``: "done", "stopped", or "rejoin": a worker has died, and a new generation of ranks is
    to go on from the checkpoint. ``alone``: whether ranks are missing, so that none can be asked.
    """

    state: str
    reason: str
    steps: int
    alone: bool = False


class Loop:
    """Drives one job. ``send`` carries messages to the live view; rank 0 writes the run folder."""

    def __init__(
        self,
        team: Team,
        recipe: Recipe,
        run: Run,
        strategy: str,
        send: Callable[[dict[str, Any]], None],
        watch: Stopwatch,
    ) -> None:
        self.team, self.job = team, team.job
        job = team.job
        self.recipe = recipe
        self._log = run.metrics_log()
        self.is_first = job.groups.world.rank == 0
        self._send = send if self.is_first else _ignore
        self.total = job.workload.total_steps
        self._steps_per_epoch = job.workload.feed.steps_per_epoch
        self.watch = watch
        self._evaluate_every = Every(recipe.evaluate.every, self._steps_per_epoch)
        self._checkpoint_every = Every(recipe.checkpoint.every, self._steps_per_epoch)
        self.convergence = Convergence(recipe.stop.metric if recipe.stop else "loss")
        self.committer = Committer(team, recipe, run, strategy, self._send)
        self.bad_examples = BadExamples(job.groups.world, run, self._send)
        self.times = StepTimes()
        self.metrics: dict[str, float] = {}
        self.members: list[dict[str, float]] = []  # metrics of each, where there are several
        self._log_every = max(1, math.ceil(self.total / LOGGED_STEPS))
        self._started = time.monotonic()
        self._shown = 0.0
        self._since: tuple[float, float] = (0.0, 0.0)
        self._reason: str | None = None  # why the run ends before all steps are done
        self._owes = False  # an evaluation was due that has not been made

    @property
    def elapsed(self) -> float:
        """Seconds of the whole run, earlier parts of a resumed one included."""
        return time.monotonic() - self._started

    def resume(self, train: dict[str, Any]) -> None:
        """Go on from what :meth:`_state` has put into a checkpoint."""
        seconds = float(train.get("seconds", 0.0))
        self._started = time.monotonic() - seconds
        self._evaluate_every.last_seconds = self._checkpoint_every.last_seconds = seconds
        self.convergence.restore(train)
        self.metrics = dict(train.get("metrics", {}))
        self.members = list(train.get("members", []))
        self.bad_examples.count = int(train.get("bad_examples", 0))
        # A run that was killed after its last checkpoint has nothing left but its end.
        self._reason = train.get("reason")
        self._owes = bool(train.get("owes_evaluation"))

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds of the loop; rank 0's is written."""
        finite = {name: value for name, value in self.metrics.items() if math.isfinite(value)}
        return {
            **self.convergence.state(),
            "seconds": self.elapsed,
            "metrics": finite,
            **({"members": self.members} if self.members else {}),
            "bad_examples": self.bad_examples.count,
            "reason": self._reason,
            **({"owes_evaluation": True} if self._owes else {}),
        }

    def run_to_end(self, stop_requested: Callable[[], bool]) -> Outcome:
        """Train from the job's next step on; the last checkpoint is on the disk. Collective."""
        self.watch.lap("start_up")
        try:
            outcome = self._train(stop_requested)
            with located(self.job.groups.world.rank, outcome.steps):
                self.committer.wait()
        except BaseException:
            self.committer.settle()  # who looks for the newest checkpoint then finds it
            raise
        finally:
            self._log.close()
        self.watch.lap("checkpoint")
        self.watch.seconds["checkpoint_hidden"] = self.committer.hidden_s
        return outcome

    def _train(self, stop_requested: Callable[[], bool]) -> Outcome:
        step, stopping = self.job.next_step, False
        if self._owes:
            self._catch_up(step)
        # Asked to stop before the first step: the ranks agree in a step, so do that one.
        while step < self.total and not stopping and self._reason is None:
            result = self.team.step(step, self._flags(stop_requested()), self.times)
            step += 1
            self.watch.lap("step")
            stopping = result.flags.stop > 0
            with located(self.job.groups.world.rank, step):
                if result.lost or not self._went_well(step, result, stopping):
                    return self._leave(step, result, stopping)
        if stopping and step < self.total and self._reason is None:
            return Outcome("stopped", "asked to stop by a signal", step)
        return Outcome("done", self._reason or "all steps done", step)

    def _went_well(self, step: int, result: StepResult, stopping: bool) -> bool:
        """Do what follows a step; False where a worker has died meanwhile that is not needed."""
        try:
            self._after(step, result, stopping)
        except PeerLost:
            if not self.team.survives():
                raise
            return False
        return True

    def _leave(self, step: int, result: StepResult, stopping: bool) -> Outcome:
        """Save what there is after `step` steps, without those that have died.

        What takes all ranks, an evaluation, is owed: whoever goes on from here makes it first.
        """
        if result.lost:
            self.bad_examples.trained(step, result)
            self._note(step, result)
        due = step == self.total or self._evaluate_every.due(step, result.flags.seconds)
        self._owes = self._owes or due
        if self._owes and self.job.workload.evaluation is None:
            self._evaluate(step, result.flags.seconds, result.loss)
        self.committer.settle()  # one in flight may have been with a rank that has died
        self.committer.commit(step, self.convergence, self._state())
        if stopping and step < self.total:
            return Outcome("stopped", "asked to stop by a signal", step, alone=True)
        return Outcome("rejoin", "a worker has died", step, alone=True)

    def _catch_up(self, step: int) -> None:
        """Make the evaluation that was due after `step` steps, when a worker had died."""
        with located(self.job.groups.world.rank, step):
            seconds = self._evaluate_every.last_seconds  # the checkpoint's: all have the same
            self._evaluate(step, seconds, math.nan)
            self._reason = self._exhausted(step, seconds)
            self.committer.commit(step, self.convergence, self._state())

    def _after(self, step: int, result: StepResult, stopping: bool) -> None:
        """After `step` steps: log, evaluate and commit, as far as each is due."""
        seconds, last = result.flags.seconds, step == self.total
        if result.flags.save_failed > 0:
            self.committer.wait()  # raises on every rank
        self.bad_examples.trained(step, result)
        self._note(step, result)
        best = False
        if last or self._evaluate_every.due(step, seconds):
            best = self._evaluate(step, seconds, result.loss)
            self._reason = self._exhausted(step, seconds)
        ends = last or stopping or self._reason is not None
        if self._checkpoint_every.due(step, seconds) or best or ends:
            self.committer.commit(step, self.convergence, self._state())
            self.watch.lap("checkpoint")

    def _exhausted(self, step: int, seconds: float) -> str | None:
        return self.convergence.exhausted(step, seconds, self.recipe.stop, self._steps_per_epoch)

    def _flags(self, stop: bool) -> Flags:
        return Flags(
            stop=float(stop),
            seconds=self.elapsed if self.is_first else 0.0,
            save_failed=float(self.committer.failed),
        )

    def _evaluate(self, step: int, seconds: float, loss: float) -> bool:
        """Evaluate after `step` steps; whether it is the best so far."""
        if self.job.workload.evaluation is None:
            self.metrics, self._owes = {"loss": loss}, False
            return False
        self._owes = True
        evaluation = self.team.evaluate()
        self.bad_examples.evaluated(step, evaluation.bad)
        self._owes = False
        self.metrics, self.members = evaluation.metrics, list(evaluation.members)
        self.watch.lap("evaluation")
        place = self._place(step)
        if self.is_first:
            members = {"members": self.members} if self.members else {}
            self._log.add({**place, "evaluation": self.metrics, **members})
        epoch = place["epoch"]
        self._send({"kind": "evaluation", "step": step, "epoch": epoch, "metrics": self.metrics})
        return self.convergence.observe(step, seconds, self.metrics)

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
        if not self.is_first:
            return
        now = time.monotonic()
        logged = step % self._log_every == 0 or step == self.total
        shown = now - self._shown >= SHOWN_EVERY_S or step == self.total
        if not (logged or shown):
            return
        line = {
            **self._place(step),
            "loss": result.loss,
            "learning_rate": result.learning_rate,
            "samples_per_second": self._rate(step),
        }
        if logged:
            self._log.add(line)
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
