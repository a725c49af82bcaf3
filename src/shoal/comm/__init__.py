"""Process groups of one generation of ranks, made here and nowhere else, passed on as a value.

    groups = Groups.form(context.rank, context.world_size, context.store, …)
    groups.data.all_reduce(tensor, "metric")      # summed in place; every byte counted

Ranks of one host on the CPU talk through memory that they share (`shared_memory/`), others by
gloo or NCCL. `Groups.alone()` is one process with no group at all: every collective is then the
identity.
"""

from shoal.comm.counter import Counter, Purpose
from shoal.comm.failures import is_peer_failure, peer_failures
from shoal.comm.groups import Group, Groups, Transport
from shoal.comm.mail import NUMBERS, Letter, Mail
from shoal.comm.pending import Pending

__all__ = [
    "NUMBERS",
    "Counter",
    "Group",
    "Groups",
    "Letter",
    "Mail",
    "Pending",
    "Purpose",
    "Transport",
    "is_peer_failure",
    "peer_failures",
]
