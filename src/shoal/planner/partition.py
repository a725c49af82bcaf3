"""Cut a chain of nodes into stages so that the slowest is as fast as can be.

    nodes        0   1   2 | 3   4 | 5   6        boundaries (3, 5): before nodes 3 and 5
    stage cost   Σ costs + what comes in at its left boundary + what goes out at its right one

    partition([4, 1, 1, 3, 3, 2, 4], [0] * 8, stages=3, allowed=range(1, 7))      # (3, 5)

By dynamic programming over the boundaries, in two passes: the first finds the least possible cost
of the slowest stage,

    slowest(k, b) = min over a < b of max(slowest(k − 1, a), cost(a, b)),

the second the least crossing among all cuts that keep to it. (One pass that compares pairs would
not do: a prefix that is not the best may cross less and be no slower than a later stage.)
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise

from shoal.errors import Refused


def partition(
    costs: Sequence[float], crossing: Sequence[float], stages: int, allowed: Iterable[int]
) -> tuple[int, ...]:
    """The `stages` − 1 boundaries, ascending, that minimise the slowest stage.

    ``costs[i]``: of node i. ``crossing[b]``: what it costs to send all that is live between nodes
    b − 1 and b, one number for each boundary from 0 to ``len(costs)`` (at those two nothing
    crosses). ``allowed``: the boundaries at which a cut is possible. Ties go to the least sum of
    `crossing`. Raises `Refused` where there are fewer cuts than are needed.
    """
    if len(crossing) != len(costs) + 1:
        raise ValueError(f"{len(crossing)} crossings for {len(costs)} nodes: one more is needed")
    cuts = sorted({cut for cut in allowed if 0 < cut < len(costs)})
    if len(cuts) < stages - 1:
        raise Refused(
            f"a pipeline of {stages} stages needs {stages - 1} cut{'s' * (stages > 2)}, and the "
            f"model has {len(cuts) or 'no'} place{'s' * (len(cuts) != 1)} where it can be cut",
            hint=f"Nearest that works: {len(cuts) + 1} stages (ranks of pp × stages on each)."
            if cuts
            else "Use a strategy without pp (dpN, dpN/zeroK, tpN).",
        )
    chain = _Chain(costs, crossing, cuts)
    slowest = chain.best(stages, math.inf, lambda before, cost, _cut: max(before, cost))[0]
    return chain.best(stages, slowest, lambda before, _cost, cut: before + chain.crossing[cut])[1]


def stage_costs(
    costs: Sequence[float], crossing: Sequence[float], boundaries: Sequence[int]
) -> list[float]:
    """What each stage costs, cut at `boundaries`."""
    chain = _Chain(costs, crossing, [])
    return [chain.cost(a, b) for a, b in pairwise((0, *boundaries, len(costs)))]


class _Chain:
    def __init__(
        self, costs: Sequence[float], crossing: Sequence[float], cuts: Sequence[int]
    ) -> None:
        self._sums = list(accumulate(costs, initial=0.0))
        self._end = len(costs)
        self.crossing = [0.0, *crossing[1:-1], 0.0] if len(costs) else [0.0]
        self._ends = [0, *cuts, self._end]

    def cost(self, start: int, stop: int) -> float:
        """Of the stage of nodes start … stop − 1."""
        return self._sums[stop] - self._sums[start] + self.crossing[start] + self.crossing[stop]

    def best(
        self, stages: int, limit: float, total: Callable[[float, float, int], float]
    ) -> tuple[float, tuple[int, ...]]:
        """The least total over all cuts into stages of cost <= `limit`, and these cuts.

        ``total(total of the stages before, cost of this stage, its left boundary)``.
        """
        last = len(self._ends) - 1
        known: dict[int, float] = {0: 0.0}
        came: list[dict[int, int]] = []
        for stage in range(1, stages + 1):
            reached: dict[int, float] = {}
            origin: dict[int, int] = {}
            for at in (last,) if stage == stages else range(stage, last):
                self._extend(at, known, limit, total, reached, origin)
            known = reached
            came.append(origin)
        place, boundaries = last, []
        for origin in reversed(came):
            place = origin[place]
            boundaries.append(self._ends[place])
        return known[last], tuple(reversed(boundaries[:-1]))

    def _extend(
        self,
        at: int,
        known: dict[int, float],
        limit: float,
        total: Callable[[float, float, int], float],
        reached: dict[int, float],
        origin: dict[int, int],
    ) -> None:
        """The best stage that ends at boundary number `at`, after those `known`."""
        stop, least = self._ends[at], math.inf
        bound = math.inf  # where the total is the slowest stage, nodes beyond `least` cannot help
        for before in range(at - 1, -1, -1):
            start = self._ends[before]
            if self._sums[stop] - self._sums[start] > min(limit, bound):
                break
            cost = self.cost(start, stop)
            if before not in known or cost > limit:
                continue
            value = total(known[before], cost, start)
            if value < least:
                least, reached[at], origin[at] = value, value, before
                bound = least if limit == math.inf else math.inf
