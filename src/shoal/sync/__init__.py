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
from shoal.strategy import Compress, DiLoCo, Easgd, Gossip, Local, Solo
from shoal.sync.agreement import Agreement, Alone
from shoal.sync.diloco import OuterSteps
from shoal.sync.elastic import Elastic
from shoal.sync.every_step import EveryStep
from shoal.sync.few_meetings import warnings_of
from shoal.sync.gossip import Neighbours
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
    "warnings_of",
]


def build_agreement(
    groups: Groups, *, summed: bool = False, compress: Compress | None = None, place: int = 0
) -> Agreement:
    """The agreement of a synchronous strategy.

    ``summed``: whether replicas sum their gradients themselves (zero2, zero3). ``compress``: how
    what they send is made smaller; ``place``: this rank's in its replica.
    """
    if groups.data.size == 1 or summed:
        return Alone(groups.world)
    return EveryStep(groups.data, groups.world, compress, place)


def build_meetings(way: Way, setting: Setting) -> Meetings:
    """How replicas that are apart come together."""
    match way:
        case Solo():
            return Never()
        case Local():
            return LocalSteps(way, setting)
        case DiLoCo():
            return OuterSteps(way, setting)
        case Easgd():
            return Elastic(way, setting)
        case Gossip(graph="complete"):
            return LocalSteps(Local(1), setting)
        case Gossip():
            return Neighbours(way, setting)
    raise Refused(f"{way} is not in this version yet")
