"""Ranks in a grid: which of them differ in some axes only.

    Mesh((("pp", 2), ("tp", 2)))        rank = 2 · stage + place in the layer
        parts(("tp",))  ->  (0, 1), (2, 3)
        parts(("pp",))  ->  (0, 2), (1, 3)

The order of the axes is the placement, outermost first.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Axes: TypeAlias = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Mesh:
    """The axes' names and degrees, outermost first. An axis that is not there has degree 1."""

    axes: Axes

    @property
    def size(self) -> int:
        return math.prod(degree for _, degree in self.axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where `rank` is along each axis."""
        place = {}
        for name, degree in reversed(self.axes):
            rank, place[name] = divmod(rank, degree)
        return place

    def with_shards(self, ranks: int | None) -> "Mesh":
        """The axis dp as two: `ranks` next to one another are a shard group ("shard") each.

        As it is where that is all of dp, or None.
        """
        axes: list[tuple[str, int]] = []
        for name, degree in self.axes:
            if name == "dp" and ranks is not None and 1 < ranks < degree:
                if degree % ranks:
                    raise ValueError(f"shard groups of {ranks} do not divide dp{degree}")
                axes += [("dp", degree // ranks), ("shard", ranks)]
            else:
                axes.append((name, degree))
        return Mesh(tuple(axes))

    def parts(self, names: Sequence[str]) -> list[tuple[int, ...]]:
        """All ranks in parts that differ along `names` only, each in rising order."""

        def others(rank: int) -> tuple[int, ...]:
            place = self.coordinates(rank)
            return tuple(place[name] for name, _ in self.axes if name not in names)

        ranks = sorted(range(self.size), key=lambda rank: (others(rank), rank))
        return [tuple(part) for _, part in itertools.groupby(ranks, key=others)]
