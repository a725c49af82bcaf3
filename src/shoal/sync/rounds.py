"""When replicas meet: every so many steps, and at the end of the run.

step     0 1 2 3 4 5 6 7 8 9        Rounds(every=4, total=10)
meets          x       x   x

Rounds(4, 10).ends(7)               # True
Rounds(4, 10).first(9)              # 8: the first step since the last meeting
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rounds:
    """Steps are 0-based. ``after``: the first that a round may hold. ``offset``: the first round is
    so long, if that is not 0; the others have ``every`` steps.
    """

    every: int
    total: int
    after: int = 0
    offset: int = 0

    def ends(self, step: int) -> bool:
        """Whether replicas meet after this step."""
        if step < self.after:
            return False
        return step + 1 == self.total or self._into(step + 1) == 0

    def first(self, step: int) -> int:
        """The first step of the round that `step` is in."""
        return max(self.after, step - self._into(step))

    def _into(self, step: int) -> int:
        return (step - self.after - self.offset) % self.every
