"""A process group for the ranks of one host, over memory that they share; gloo stays beside it.

    rank 0   │ own tensor ─▶ slot ─┐            ┌─▶ slot (sums) ─┐
    rank 1   │ own tensor ─▶ slot ─┴─ r0+r1+… ──┴─▶ slot (sums) ─┴─▶ own tensor

    shared_memory.register()
    dist.init_process_group(shared_memory.BACKEND, store=store, rank=rank, world_size=size)

`core.c` has the protocol and the arithmetic, `plain.py` the same in Python where there was no
compiler; `memory.py` finds the others, `group.py` is what torch sees, `work.py` runs one collective
at a time. What it promises:

- Sums are in rank order (bfloat16 and float16 accumulate in float32 and are rounded once), so their
  bits depend neither on an element's place in its buffer nor on how gradients are put into buckets.
- Different collectives at the same time (kind, type, size, root) are an error that names both.
- A killed rank is an error within some 0.1 s, a stopped one at the group's time-out; both name the
  rank. Nothing is left when all ranks are killed, as nothing has a name.

How many times as fast as gloo over loopback (medians of benchmarks/collectives.py on 2 cores, which
vary with what else the host does): all-reduce of 1, 4, 16, 64 MB of float32 on two ranks 24, 10,
5, 4 with the C library and 8, 4, 3, 2 in Python; on four ranks 5, 3, 2, 2 and 3.5, 1.6, 1.1, 1.5.
"""

from shoal.comm.shared_memory.failure import CALLS_SIGN, PEER_SIGN, CannotShare
from shoal.comm.shared_memory.group import BACKEND, SharedMemoryGroup, register

__all__ = ["BACKEND", "CALLS_SIGN", "PEER_SIGN", "CannotShare", "SharedMemoryGroup", "register"]
