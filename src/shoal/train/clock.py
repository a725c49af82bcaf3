"""When something is due: each so many steps, epochs, or seconds of rank 0's clock."""

import time
from dataclasses import dataclass, field

from shoal.units import Duration


@dataclass
class Every:
    """Due at multiples of a number of steps; or, for a duration in seconds, by the clock.

    Clocks differ between ranks: ``seconds`` is rank 0's, which travels with each step.
    """

    duration: Duration
    steps_per_epoch: int
    last_seconds: float = 0.0

    def due(self, steps_done: int, seconds: float) -> bool:
        """Whether it is due after `steps_done` steps, `seconds` into the run."""
        steps = self.duration.steps(self.steps_per_epoch)
        if steps is not None:
            return steps_done % steps == 0
        if seconds - self.last_seconds < self.duration.value:
            return False
        self.last_seconds = seconds
        return True


@dataclass
class Stopwatch:
    """Seconds by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> float:
        """Book the time since the last lap under `name`; returns it."""
        now = time.perf_counter()
        spent, self._since = now - self._since, now
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        return spent
