"""Everything between replicas: how they agree on gradients or weights.

agreement = build_agreement(groups)         # on gradients, at every step
agreement.attach(replica)
totals = agreement.share(local)             # a small vector, summed over all ranks

meetings = build_meetings(Local(16), setting)     # of replicas with weights of their own
meetings.after(step)
"""

from shoal.comm import Groups
from shoal.errors import Refused
from shoal.strategy import Agreement as Way
from shoal.strategy import Local, Solo
from shoal.sync.agreement import Agreement, Alone
from shoal.sync.every_step import EveryStep
from shoal.sync.local_steps import LocalSteps
from shoal.sync.meetings import Meetings, Never, Setting

__all__ = [
    "Agreement",
    "Alone",
    "EveryStep",
    "Meetings",
    "Setting",
    "build_agreement",
    "build_meetings",
]


def build_agreement(groups: Groups, *, summed: bool = False) -> Agreement:
    """The agreement of a synchronous strategy.

    ``summed``: whether replicas sum their gradients themselves (zero2, zero3).
    """
    if groups.data.size == 1 or summed:
        return Alone(groups.world)
    return EveryStep(groups.data, groups.world)


def build_meetings(way: Way, setting: Setting) -> Meetings:
    """How replicas that are apart come together."""
    if isinstance(way, Solo):
        return Never()
    if isinstance(way, Local):
        return LocalSteps(way, setting)
    raise Refused(f"{way} is not in this version yet")
