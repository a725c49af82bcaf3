"""Where the time of training steps goes, on this rank.

    step   input │ forward │ backward │ communication, exposed │ optimizer │ rest
                       communication, hidden: while this rank computed, and no part of the sum

Each is the host's time: on a GPU, whose work is queued, it shows what keeps the host.
"""

import time
from dataclasses import asdict, dataclass

from shoal.comm import Counter


@dataclass
class StepTimes:
    """Seconds, summed over steps. `communication_hidden` runs beside the others."""

    input: float = 0.0
    forward: float = 0.0
    backward: float = 0.0
    communication_exposed: float = 0.0
    communication_hidden: float = 0.0
    optimizer: float = 0.0

    def timings(self, step_s: float) -> dict[str, float]:
        """``{"step.input": …}``; ``step_s`` is what the steps took in all, for the rest."""
        booked = {f"step.{name}": seconds for name, seconds in asdict(self).items()}
        rest = step_s - sum(booked.values()) + self.communication_hidden
        return booked | {"step.rest": max(0.0, rest)}


class Split:
    """Books the parts of one step; what was waiting for other ranks is taken out of each."""

    def __init__(self, times: StepTimes, counter: Counter) -> None:
        self._times = times
        self._counter = counter
        self._since = time.perf_counter()
        self._waited_s = counter.waited_s

    def book(self, name: str) -> None:
        """Book the time since the last call under `name`."""
        now, waited_s = time.perf_counter(), self._counter.waited_s
        waited = waited_s - self._waited_s
        self._times.communication_exposed += waited
        setattr(self._times, name, getattr(self._times, name) + now - self._since - waited)
        self._since, self._waited_s = now, waited_s

    def hidden(self, seconds: float) -> None:
        """Book communication that went on while this rank computed."""
        self._times.communication_hidden += seconds
