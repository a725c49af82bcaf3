"""Whose tensors are whose in asynchronous SGD.

owned = share_out(replica, groups, Async(2))      # {"fc.weight": 0, "fc.bias": 1}
"""

from typing import TYPE_CHECKING, Any

from shoal.comm import Groups
from shoal.parallel.owned import Owned
from shoal.strategy import Async
from shoal.sync.asynchronous import deal, kept_tensors

if TYPE_CHECKING:
    from shoal.parallel import Replica


def owners_of(groups: Groups, way: Async) -> tuple[int, ...]:
    """The ranks that own parameters: the first ``servers``, or all."""
    return tuple(range(way.servers or groups.world.size))


def workers_of(groups: Groups, way: Async) -> tuple[int, ...]:
    """The ranks that compute contributions: all that are no servers."""
    return tuple(range(way.servers, groups.world.size))


def kept_by(rank: int, owners: tuple[int, ...], way: Async) -> tuple[int, ...]:
    """Whose parts a rank keeps: its own, and with copies that of the owner before it."""
    if rank not in owners:
        return ()
    place = owners.index(rank)
    return (rank, owners[place - 1]) if way.copies else (rank,)


def share_out(replica: "Replica | Any", groups: Groups, way: Async) -> dict[str, int]:
    """Deal the model's tensors to the owners; let the replica keep this rank's beside the model."""
    sizes = {name: each.numel() for name, each in kept_tensors(replica.model).items()}
    owners = owners_of(groups, way)
    owned = deal(sizes, len(owners))
    keeps = kept_by(groups.world.rank, owners, way)
    mine = [name for name, owner in owned.items() if owner in keeps]
    replica.states = Owned(replica.model, mine)
    return owned
