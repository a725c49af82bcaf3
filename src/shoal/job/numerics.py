"""How `auto` computes: which numerics are worth a try on this processor, and which one won.

    candidates(dp2, images=True)    (dp2, dp2+bf16+channels_last, dp2+channels_last)
    choose([Tried("dp2", 0.40, …), Tried("dp2+bf16+channels_last", 0.19, …)])
                                    dp2+bf16+channels_last: 2.1 times as fast, loss unhurt

The first candidate is the plain one. Another takes its place if its steps are at least a tenth
faster and it does no harm: the first loss, of the same weights on the same batch, is the plain
one's, and those that follow are not worse. (They may well differ: where the first steps of a
training are wild, rounding alone sends it on another way.)
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.job.resolve import Resolved
from shoal.strategy import Strategy

WARM_UP_STEPS = 1
TRIED_STEPS = 4
MAX_SHARE = 0.2  # of a run's steps, that trying may take: twice the speed pays that back
MIN_GAIN = 1.1
# bf16 has 8 bits of precision, and a loss is a mean: where nothing is wrong the first one differs
# by some hundredths of a percent (measured on three untrained networks: 0.00 to 0.03 %).
FIRST_TOLERANCE = 0.02
# Of the mean of the losses that follow. Measured on a transformer whose first losses were 2.6, 1.7,
# 1.1, 0.7 in float32: 2.8, 1.5, 1.0, 0.8 in bf16.
WORSE_TOLERANCE = 0.1


@dataclass(frozen=True)
class Tried:
    """What a few steps showed: seconds a step (a median, without warm-up), and the loss of each.

    ``failed``: why it could not be tried to the end.
    """

    strategy: str
    step_s: float
    losses: tuple[float, ...] = ()
    failed: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Tried":
        return cls(**{**value, "losses": tuple(value["losses"])})


def candidates(strategy: Strategy, *, images: bool) -> tuple[Strategy, ...]:
    """The plain strategy, and the same in other numerics; ``images``: inputs are [n, C, H, W]."""
    others: list[dict[str, Any]] = [{"bf16": True}]
    if images:
        others = [{"bf16": True, "channels_last": True}, {"channels_last": True}]
    return (strategy, *(dataclasses.replace(strategy, **other) for other in others))


def steps_needed(tried: int) -> int:
    """How many steps a run must have for it to be worth trying so many candidates."""
    return math.ceil(tried * (WARM_UP_STEPS + TRIED_STEPS) / MAX_SHARE)


def choose(tried: Sequence[Tried]) -> tuple[Strategy, str]:
    """The fastest candidate that does no harm, and why. The first one is the plain one."""
    plain = tried[0]
    best, notes = plain, []
    for each in tried[1:]:
        objection = _objection(each, plain)
        if objection is not None:
            notes.append(f"{each.strategy} {objection}")
        elif each.step_s < best.step_s:
            best = each
    if best is plain:
        return Strategy.parse(plain.strategy), f"{plain.strategy} stays: " + "; ".join(notes)
    gain = plain.step_s / best.step_s
    reason = (
        f"auto chose {best.strategy}: {gain:.1f} times as fast as {plain.strategy} over "
        f"{len(best.losses)} steps, loss {_late(best):.4g} (beside {_late(plain):.4g})"
    )
    return Strategy.parse(best.strategy), "; ".join([reason, *notes])


def tried_of(outcome: dict[str, Any]) -> list[Tried]:
    """What the ranks' trial (`train.trial`) says."""
    return [Tried.from_json(each) for each in outcome["tried"]]


def settled(resolved: Resolved, tried: Sequence[Tried], reason: str | None = None) -> Resolved:
    """`resolved` with the best of what was tried; ``reason``: why nothing was."""
    if len(tried) < 2:
        said = reason or "precision float32: asked to stop before others were tried"
        return resolved.settled(resolved.strategy, said)
    return resolved.settled(*choose(tried))


def as_begun(resolved: Resolved, begun: Strategy) -> Resolved:
    """`resolved` in the numerics of the run that goes on: its bits depend on them."""
    strategy = dataclasses.replace(
        resolved.strategy, bf16=begun.bf16, channels_last=begun.channels_last
    )
    return resolved.settled(strategy, f"numerics as the run has begun: {strategy}")


def _objection(tried: Tried, plain: Tried) -> str | None:
    if tried.failed is not None:
        return f"does not run ({tried.failed})"
    if tried.step_s * MIN_GAIN > plain.step_s:
        return f"is {plain.step_s / tried.step_s:.2f} times as fast"
    first, expected = tried.losses[0], plain.losses[0]
    if not abs(first - expected) <= FIRST_TOLERANCE * abs(expected):
        return f"has another loss to begin with ({first:.4g}, {expected:.4g} in {plain.strategy})"
    late, expected = _late(tried), _late(plain)
    if not late <= expected + WORSE_TOLERANCE * abs(expected):
        return f"hurts the loss ({late:.4g}, {expected:.4g} in {plain.strategy})"
    return None


def _late(tried: Tried) -> float:
    """The mean loss of the steps after the first."""
    return statistics.fmean(tried.losses[1:])
