"""When a run has converged: no better value of a metric for a while.

The decision uses numbers that are equal on all ranks, so all stop at the same step.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shoal.recipe import StopSpec

LOWER_IS_BETTER = frozenset({"loss"})


@dataclass
class Convergence:
    """The best evaluation so far, and when it was. Part of each checkpoint."""

    metric: str
    best: float | None = None
    best_step: int = 0
    best_seconds: float = 0.0

    def better(self, value: float) -> bool:
        """Whether `value` beats the best; what is not finite never does."""
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        return value < self.best if self.metric in LOWER_IS_BETTER else value > self.best

    def observe(self, step: int, seconds: float, metrics: Mapping[str, float]) -> bool:
        """Take in an evaluation after `step` steps; whether it is the best so far."""
        value = metrics.get(self.metric)
        if value is None or not self.better(value):
            return False
        self.best, self.best_step, self.best_seconds = value, step, seconds
        return True

    def exhausted(
        self, step: int, seconds: float, stop: StopSpec | None, steps_per_epoch: int
    ) -> str | None:
        """Why the run should end now; None to go on."""
        if stop is None or self.best is None:
            return None
        patience = stop.patience.steps(steps_per_epoch)
        if patience is None:
            waited_enough = seconds - self.best_seconds >= stop.patience.value
        else:
            waited_enough = step - self.best_step >= patience
        if not waited_enough:
            return None
        return (
            f"{self.metric} has not been better than {self.best:.6g} (step {self.best_step}) "
            f"for {stop.patience}"
        )

    def state(self) -> dict[str, Any]:
        """Its values, as JSON."""
        return asdict(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`, if that was of the same metric."""
        if state.get("metric") == self.metric:
            self.best, self.best_step = state["best"], state["best_step"]
            self.best_seconds = float(state.get("best_seconds", 0.0))
