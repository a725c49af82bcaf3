"""Whether a strategy claims to compute what one device does: only that can be verified.

require_one_device(Strategy.parse("dp2/local:8"))       # Refused: weights of their own
"""

from dataclasses import replace

from shoal.errors import Refused
from shoal.strategy import EVERY_STEP, Async, Solo, Strategy, Zero

SEE = "docs/agreements.md says which of them equals what, and when."


def require_one_device(strategy: Strategy) -> None:
    """Raises Refused, with the reason, for a strategy that is another algorithm."""
    agreement, compress = strategy.agreement, strategy.compress
    if isinstance(agreement, Async):
        raise Refused(
            f"{strategy}: contributions are applied in the order in which workers finish, which is "
            "another one in each run: there is no one device's training to compare with",
            hint=f"Verify the same axes without {agreement}.",
        )
    if isinstance(agreement, Solo):
        raise Refused(
            f"{strategy}: replicas never meet, so that there is not one model but several",
            hint=_within(strategy),
        )
    if agreement.apart:
        raise Refused(
            f"{strategy}: between meetings replicas have weights of their own, which one device "
            "has not: they are another algorithm, not another split",
            hint=f"{_within(strategy)} {SEE}",
        )
    lossless = compress is None or (compress.method == "topk" and compress.amount == 100)
    if not lossless:
        raise Refused(
            f"{strategy}: {compress} sends an approximation of the gradients",
            hint=f"Verify the same strategy without it, or with compress:topk=100. {SEE}",
        )


def _within(strategy: Strategy) -> str:
    """What can be verified of it."""
    ranks = strategy.dp // strategy.replicas
    axes = tuple((name, ranks if name == "dp" else n) for name, n in strategy.axes)
    zero = None if strategy.zero is None else Zero(strategy.zero.stage)
    inner = replace(strategy, axes=axes, zero=zero, agreement=EVERY_STEP, compress=None)
    if inner.world_size == 1:
        return "Each replica is one device's training: there is no split to verify."
    return f"The split within a replica can be verified: {inner}."
