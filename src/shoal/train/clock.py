"""When something is due: each so many steps, epochs, or seconds of rank 0's clock."""

import time
from dataclasses import dataclass, field

from shoal.units import Duration


@dataclass
class Every:
    """Due at multiples of a number of steps; or, for a duration in seconds, by the clock.

    Clocks differ between ranks, so rank 0's word goes into the step's shared flags, and all ranks
    act on that.
    """

    duration: Duration
    steps_per_epoch: int
    _last: float = field(default_factory=time.monotonic)

    def clock_says(self) -> bool:
        """Whether this rank's clock says that it is due (never, for steps and epochs)."""
        return self.duration.unit == "seconds" and (
            time.monotonic() - self._last >= self.duration.value
        )

    def due(self, steps_done: int, shared_clock: float) -> bool:
        """Whether it is due after `steps_done` steps; ``shared_clock`` > 0 if rank 0 said so."""
        steps = self.duration.steps(self.steps_per_epoch)
        is_due = shared_clock > 0 if steps is None else steps_done % steps == 0
        if is_due:
            self._last = time.monotonic()
        return is_due


class Stopwatch:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> float:
        """Book the time since the last lap under `name`; returns it."""
        now = time.perf_counter()
        spent, self._since = now - self._since, now
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        return spent
