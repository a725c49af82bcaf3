"""Everything between replicas: how they agree on gradients or weights.

    agreement = EveryStep(groups.data)          # or Alone()
    agreement.attach(replica)
    totals = agreement.share(local)             # a small vector, summed over the replicas

This version has the reference only: `sync`, an all-reduce of gradients at each step.
"""

from shoal.comm import Group
from shoal.sync.agreement import Agreement, Alone
from shoal.sync.every_step import EveryStep

__all__ = ["Agreement", "Alone", "EveryStep", "build_agreement"]


def build_agreement(group: Group) -> Agreement:
    """The agreement of a synchronous strategy over `group`."""
    return Alone() if group.size == 1 else EveryStep(group)
