"""Everything between replicas: how they agree on gradients or weights.

    agreement = build_agreement(groups)
    agreement.attach(replica)
    totals = agreement.share(local)             # a small vector, summed over all ranks

This version has the reference only: `sync`, an all-reduce of gradients at each step.
"""

from shoal.comm import Groups
from shoal.sync.agreement import Agreement, Alone
from shoal.sync.every_step import EveryStep

__all__ = ["Agreement", "Alone", "EveryStep", "build_agreement"]


def build_agreement(groups: Groups, *, summed: bool = False) -> Agreement:
    """The agreement of a synchronous strategy.

    ``summed``: whether replicas sum their gradients themselves (zero2, zero3).
    """
    if groups.data.size == 1 or summed:
        return Alone(groups.world)
    return EveryStep(groups.data, groups.world)
