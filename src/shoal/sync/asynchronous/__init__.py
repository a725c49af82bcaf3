"""`async:S`: asynchronous SGD with a bound on staleness that is enforced, and audited.

claims (sync/claims.py)     who may start on which contribution
coordinator                 rank 0: claims, versions, the ledger
shard, parts                an owner's tensors: contributions in order, one update a step
member                      one rank: its threads and its letters

member = Member(groups.mail, course, Place(parts, shard), Ledger(…))
"""

from shoal.sync.asynchronous.coordinator import Coordinator, Course
from shoal.sync.asynchronous.letters import Finished, Record
from shoal.sync.asynchronous.member import Member
from shoal.sync.asynchronous.parts import Part, deal, dtype_of, kept_tensors
from shoal.sync.asynchronous.roles import Grant, Ledger, Place
from shoal.sync.asynchronous.shard import Piece, Rules, Shard

__all__ = [
    "Coordinator",
    "Course",
    "Finished",
    "Grant",
    "Ledger",
    "Member",
    "Part",
    "Piece",
    "Place",
    "Record",
    "Rules",
    "Shard",
    "deal",
    "dtype_of",
    "kept_tensors",
]
