"""How a collective ended, as a core tells it."""

from enum import IntEnum
from typing import NamedTuple, Protocol

from shoal.comm.shared_memory.call import Call


class Verdict(IntEnum):
    """As in core.c."""

    OK = 0
    TIMED_OUT = 1
    LOST = 2
    LEFT = 3
    DIFFERS = 4
    UNKNOWN_TYPE = 5


class Outcome(NamedTuple):
    """`culprit` is the rank that an error is about."""

    verdict: Verdict
    culprit: int


class Core(Protocol):
    """What runs collectives over a group's memory: `NativeCore`, `PlainCore`."""

    @property
    def sequence(self) -> int: ...

    def run(self, call: Call) -> Outcome: ...

    def leave(self, blamed: int) -> None: ...
