"""Feeds of replicas that learn apart: each from its own part of the data, or in its own order.

    examples, by a permutation that no epoch changes      [ part 0 | part 1 | part 2 ]
    member r, epoch e                                     its part, in an order of its own
    member r, step s                                      as many as its share of the global batch

    part = MemberFeed(feed, Member(0, of=3))
    part.read(step, 0, part.batch_examples(step))

Over the members the parts are the whole set, and each step's batches as large as the global batch.
"""

import itertools
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.data.batch import Batch
from shoal.data.keyed import derive_key
from shoal.data.order import order
from shoal.errors import Refused

_PARTS = 0x7061727473  # "parts": no epoch's order has this key
_OWN = 0x6F776E  # "own"


class Whole(Protocol):
    """What members' feeds are made of: a `Feed`."""

    seed: int
    batch_size: int

    @property
    def examples(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def position(self, step: int) -> dict[str, int]: ...
    def batch_examples(self, step: int) -> int: ...
    def read_examples(
        self, places: NDArray[np.int64], epoch: int, step: int, first: int
    ) -> Batch: ...
    def prefetch_examples(self, places: NDArray[np.int64]) -> None: ...


@dataclass(frozen=True)
class Member:
    """One of several models; ``full``: whether it reads the whole batch, in an order of its own."""

    number: int
    of: int
    full: bool = False
    unit: int = 1  # what its share of a batch is a multiple of: a statistics group


class MemberFeed:
    """What one member reads. Positions and rows count from 0 in its own batch.

    Raises `Refused` where no batch has anything for it.
    """

    def __init__(self, feed: Whole, member: Member) -> None:
        self._feed = feed
        self._member = member
        self._seed = derive_key(_OWN, feed.seed, member.number) >> 2
        ends = itertools.accumulate(self._batch(step) for step in range(feed.steps_per_epoch))
        self._starts = [0, *ends]  # of each step of an epoch, in the member's part
        self._part = self._examples_of_part()
        if not self.examples:
            raise Refused(
                f"member {member.number} of {member.of} would never get an example: batches of "
                f"{feed.batch_size} are shared out in units of {member.unit}",
                hint="Take fewer members, larger batches, or a smaller normalize_over.",
            )

    @property
    def examples(self) -> int:
        """How many examples an epoch has."""
        return self._starts[-1]

    @property
    def steps_per_epoch(self) -> int:
        """As many as the global batch's."""
        return self._feed.steps_per_epoch

    @property
    def fingerprint(self) -> str:
        """A digest of the whole set."""
        return self._feed.fingerprint

    def position(self, step: int) -> dict[str, int]:
        """As of the whole set: it is the same for all members."""
        return self._feed.position(step)

    def batch_examples(self, step: int) -> int:
        """How many examples of a step this member has; it may be none."""
        return self._batch(step % self._feed.steps_per_epoch)

    def first(self, step: int) -> int:
        """A place among the rows of all members that no other member's rows have."""
        if self._member.full:
            return self._member.number * self._feed.batch_size
        return self._share(self._feed.batch_examples(step))[0]

    def read(self, step: int, start: int, stop: int) -> Batch:
        """The examples at positions [start, stop) of the member's batch; as `Feed.read`."""
        epoch, ids = self._ids(step, start, stop)
        return self._feed.read_examples(ids, epoch, step, start)

    def prefetch(self, step: int, start: int, stop: int) -> None:
        """Begin to decode what will be read next; as `Feed.prefetch`."""
        self._feed.prefetch_examples(self._ids(step, start, stop)[1])

    def _batch(self, step: int) -> int:
        size = self._feed.batch_examples(step)
        if self._member.full:
            return size
        start, stop = self._share(size)
        return stop - start

    def _share(self, examples: int) -> tuple[int, int]:
        cuts = _cuts(examples, self._member)
        return cuts[self._member.number], cuts[self._member.number + 1]

    def _examples_of_part(self) -> NDArray[np.int64]:
        """The examples that this member sees, in no order yet."""
        examples = self._feed.examples
        if self._member.full:
            return np.arange(examples)
        sizes = np.zeros(self._member.of, dtype=np.int64)
        for step in range(self._feed.steps_per_epoch):
            sizes += np.diff(_cuts(self._feed.batch_examples(step), self._member))
        first = int(sizes[: self._member.number].sum())
        places = np.arange(first, first + int(sizes[self._member.number]))
        seed = derive_key(_PARTS, self._feed.seed) >> 2
        return order(places, examples=examples, seed=seed, epoch=0)

    def _ids(self, step: int, start: int, stop: int) -> tuple[int, NDArray[np.int64]]:
        epoch, within = divmod(step, self._feed.steps_per_epoch)
        size = self.batch_examples(step)
        if not 0 <= start <= stop <= size:
            raise IndexError(f"positions {start}..{stop} are not within the {size} of step {step}")
        places = np.arange(start, stop) + self._starts[within]
        ordered = order(places, examples=self.examples, seed=self._seed, epoch=epoch)
        return epoch, self._part[ordered]


def _cuts(examples: int, member: Member) -> list[int]:
    """Borders of all members' shares: sizes differ by one unit at most."""
    each, more = divmod(-(-examples // member.unit), member.of)
    cuts = [0]
    for number in range(member.of):
        cuts.append(min(examples, cuts[-1] + (each + (number < more)) * member.unit))
    return cuts
