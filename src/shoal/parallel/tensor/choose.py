"""Which classes are cut: the set of largest gain of which no two conflict.

    gain(class) = share of parameters + share of multiplications − 0.1 · share of bytes moved

    chosen = choose({0: 0.4, 1: 0.3, 2: 0.3}, {0: {1, 2}, 1: {0}, 2: {0}})       # {1, 2}

A maximum-weight independent set: exact by branch and bound, component by component, up to a number
of steps; then the greedy one by gain ÷ (conflicts + 1), to which the search is compared.
"""

from collections.abc import Mapping

STEPS = 50_000


def choose(gains: Mapping[int, float], conflicts: Mapping[int, set[int]]) -> set[int]:
    """The chosen of the keys of `gains`; those without a gain never are. Deterministic."""
    left = {key for key, gain in gains.items() if gain > 0}
    chosen: set[int] = set()
    while left:
        component = _component(min(left), left, conflicts)
        left -= component
        search = _Search(gains, conflicts)
        search.best = _greedy(component, gains, conflicts)
        search.best_gain = sum(gains[key] for key in sorted(search.best))
        order = sorted(component, key=lambda key: (-gains[key], key))
        search.extend(order, set(), 0.0)
        chosen |= search.best
    return chosen


def _component(start: int, within: set[int], conflicts: Mapping[int, set[int]]) -> set[int]:
    found, todo = {start}, [start]
    while todo:
        for other in conflicts.get(todo.pop(), set()) & within:
            if other not in found:
                found.add(other)
                todo.append(other)
    return found


def _greedy(
    component: set[int], gains: Mapping[int, float], conflicts: Mapping[int, set[int]]
) -> set[int]:
    left, chosen = set(component), set[int]()
    while left:
        best = max(
            left, key=lambda key: (gains[key] / (1 + len(conflicts.get(key, set()) & left)), -key)
        )
        chosen.add(best)
        left -= {best, *conflicts.get(best, set())}
    return chosen


class _Search:
    def __init__(self, gains: Mapping[int, float], conflicts: Mapping[int, set[int]]) -> None:
        self._gains, self._conflicts = gains, conflicts
        self.best: set[int] = set()
        self.best_gain = 0.0
        self._steps = 0

    def extend(self, left: list[int], chosen: set[int], gain: float) -> None:
        """Try the first of `left` with and without."""
        self._steps += 1
        if self._steps > STEPS:
            return
        while left:
            if gain + sum(self._gains[key] for key in left) <= self.best_gain + 1e-12:
                return
            first, left = left[0], left[1:]
            against = self._conflicts.get(first, set())
            rest = [key for key in left if key not in against]
            self.extend(rest, chosen | {first}, gain + self._gains[first])
            if len(rest) == len(left):
                return  # nothing speaks against it: leaving it out cannot be better
        if gain > self.best_gain + 1e-12:
            self.best, self.best_gain = set(chosen), gain
