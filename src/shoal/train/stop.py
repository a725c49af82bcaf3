"""When a run has converged: no better value of a metric for a while.

The decision uses numbers that are equal on all ranks, so all stop at the same step.
"""

from dataclasses import asdict, dataclass
from typing import Any

from shoal.recipe import StopSpec

LOWER_IS_BETTER = frozenset({"loss"})


@dataclass
class Convergence:
    """The best evaluation so far, and how long ago it was. Part of each checkpoint."""

    metric: str
    best: float | None = None
    best_step: int = 0

    def better(self, value: float) -> bool:
        if self.best is None:
            return True
        return value < self.best if self.metric in LOWER_IS_BETTER else value > self.best

    def observe(self, step: int, metrics: dict[str, float]) -> bool:
        """Take in an evaluation after `step` steps; whether it is the best so far."""
        value = metrics.get(self.metric)
        if value is None or not self.better(value):
            return False
        self.best, self.best_step = value, step
        return True

    def exhausted(self, step: int, stop: StopSpec | None, steps_per_epoch: int) -> str | None:
        """Why the run should end now; None to go on."""
        if stop is None or self.best is None:
            return None
        patience = stop.patience.steps(steps_per_epoch)
        if patience is None or step - self.best_step < patience:
            return None
        return (
            f"{self.metric} has not been better than {self.best:.6g} (step {self.best_step}) "
            f"for {stop.patience}"
        )

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def restore(self, state: dict[str, Any]) -> None:
        if state.get("metric") == self.metric:
            self.best, self.best_step = state["best"], state["best_step"]
