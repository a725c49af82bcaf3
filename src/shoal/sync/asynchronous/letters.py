"""What ranks say to one another in asynchronous SGD, as the numbers of letters.

worker ─ READY, FINISHED ─▶ coordinator ─ GRANT ─▶ worker
worker ─ PULL ─▶ owner ─ WEIGHTS ─▶ worker ─ PIECE ─▶ owner ◀─ ACCEPT, DISCARD ─ coordinator
owner ─ APPLIED ─▶ coordinator
coordinator ─ RECORD ─▶ every rank              owner ─ NORM ─▶ every other owner
coordinator ─ RECALL ─▶ owner ─ RECALLED ─▶ coordinator ─ DROP ─▶ owner      a worker has died
"""

from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import Self


class Kind(IntEnum):
    """Of letters, with their numbers."""

    READY = 1  # step, stop, save_failed: this rank's loop is at `step`
    FINISHED = 2  # `Finished`
    GRANT = 3  # step, index, attempt, version, is_refused
    ACCEPT = 4  # step, index, attempt
    DISCARD = 5  # step, index, attempt
    PULL = 6  # version
    WEIGHTS = 7  # version, is_there; the owner's part
    PIECE = 8  # step, index, attempt, version, count, has_gradient; the part of the gradient
    APPLIED = 9  # version
    RECORD = 10  # `Record`
    NORM = 11  # step, round, how many pairs; (owner, the square of the norm of its part) …
    RECALL = 12  # step, index, attempt, worker: has its piece come?
    RECALLED = 13  # step, index, lacks: it has not, and never will
    DROP = 14  # step, index, attempt: some owner lacks it, another worker does it again
    MEET = 15  # number of the meeting; what an owner says there, a byte an element


@dataclass(frozen=True)
class Finished:
    """A contribution as its worker tells of it: sums over its examples."""

    step: int
    index: int
    attempt: int
    loss: float
    count: float
    bad_examples: float
    refused: bool

    @classmethod
    def of(cls, numbers: tuple[float, ...]) -> Self:
        step, index, attempt, loss, count, bad, refused = numbers[:7]
        return cls(int(step), int(index), int(attempt), loss, count, bad, bool(refused))

    @property
    def numbers(self) -> tuple[float, ...]:
        return tuple(float(value) for value in astuple(self))


@dataclass(frozen=True)
class Record:
    """What a step was, for all ranks alike: version ``step + 1`` is there.

    ``is_boundary``: nothing later is begun before all ranks have come here; what they decide
    together (``stop``, ``bad_examples``, ``save_failed``) is told only then. ``culprit``: the first
    rank whose contribution was refused, where none was left to apply; else -1. ``lost``: how many
    workers have died, at a boundary.
    """

    step: int
    loss: float
    count: float
    stop: float = 0.0
    seconds: float = 0.0
    bad_examples: float = 0.0
    save_failed: float = 0.0
    is_boundary: bool = False
    culprit: int = -1
    lost: int = 0

    @property
    def numbers(self) -> tuple[float, ...]:
        return tuple(float(value) for value in astuple(self))

    @classmethod
    def of(cls, numbers: tuple[float, ...]) -> Self:
        step, loss, count, stop, seconds, bad, failed = numbers[:7]
        boundary, culprit, lost = (int(number) for number in numbers[7:10])
        told = int(step), loss, count, stop, seconds, bad, failed
        return cls(*told, bool(boundary), culprit, lost)
