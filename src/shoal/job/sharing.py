"""Who reads which positions of a global batch.

shares(50, 3) == ((0, 17), (17, 34), (34, 50))
shares(50, 3, multiple=8) == ((0, 24), (24, 40), (40, 50))
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any, Protocol

from shoal.parallel import Share


class Feed(Protocol):
    """Global batches by step and position; knows no ranks."""

    @property
    def examples(self) -> int: ...
    @property
    def steps_per_epoch(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def batch_examples(self, step: int) -> int: ...
    def read(self, step: int, start: int, stop: int) -> Any: ...
    def prefetch(self, step: int, start: int, stop: int) -> None: ...
    def position(self, step: int) -> dict[str, int]: ...


def shares(examples: int, ranks: int, multiple: int = 1) -> tuple[tuple[int, int], ...]:
    """Cut ``[0, examples)`` into consecutive (start, stop), sizes differing by `multiple` at most.

    Borders are multiples of `multiple`: of the size of statistics groups, where one has to lie
    whole on a rank. Fewer examples than ranks leave the last ranks with none.
    """
    each, more = divmod(-(-examples // multiple), ranks)
    cuts = [0]
    for rank in range(ranks):
        cuts.append(min(examples, cuts[-1] + (each + (rank < more)) * multiple))
    return tuple(itertools.pairwise(cuts))


def share_of(examples: int, ranks: int, multiple: int = 1) -> Share:
    """The shares of one step, as the replicas need them."""
    return Share(examples, shares(examples, ranks, multiple))


@dataclass(frozen=True)
class ReplicaFeed:
    """One replica's share of each global batch as a feed of its own: rows count from 0 in it.

    For replicas that learn apart. ``unit``: what shares are multiples of.
    """

    whole: Feed
    replica: int
    replicas: int
    unit: int = 1

    @property
    def examples(self) -> int:
        return self.whole.examples

    @property
    def steps_per_epoch(self) -> int:
        return self.whole.steps_per_epoch

    @property
    def fingerprint(self) -> str:
        return self.whole.fingerprint

    def position(self, step: int) -> dict[str, int]:
        return self.whole.position(step)

    def _share(self, step: int) -> tuple[int, int]:
        return shares(self.whole.batch_examples(step), self.replicas, self.unit)[self.replica]

    def first(self, step: int) -> int:
        """Where the replica's share begins in the global batch."""
        return self._share(step)[0]

    def batch_examples(self, step: int) -> int:
        start, stop = self._share(step)
        return stop - start

    def read(self, step: int, start: int, stop: int) -> Any:
        """As of the whole, at the same examples."""
        first = self.first(step)
        batch = self.whole.read(step, first + start, first + stop)
        return replace(batch, rows=batch.rows - first)

    def prefetch(self, step: int, start: int, stop: int) -> None:
        first = self.first(step)
        self.whole.prefetch(step, first + start, first + stop)
