"""From a core's verdict to the error that says which rank, what, and where.

error_of(memory, names, call, sequence, outcome)     # PeerGone, CallsDiffer
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from shoal.comm.shared_memory.call import Call
from shoal.comm.shared_memory.failure import CallsDiffer, PeerGone
from shoal.comm.shared_memory.layout import ARRIVED, BLAMED, Header
from shoal.comm.shared_memory.outcome import Outcome, Verdict

if TYPE_CHECKING:
    from shoal.comm.shared_memory.memory import Memory


def error_of(
    memory: "Memory", names: Sequence[int], call: Call, sequence: int, outcome: Outcome
) -> RuntimeError:
    """The error for an outcome other than OK. ``names``: what each rank of the group is called."""
    here = Header.of(call, sequence)
    who = f"rank {names[outcome.culprit]}"
    process = memory.processes[outcome.culprit]
    match outcome.verdict:
        case Verdict.DIFFERS:
            at = memory.layout.header_at(outcome.culprit, sequence)
            there = Header.read(memoryview(memory.buffer), at)
            own = names[memory.rank]
            return CallsDiffer(f"rank {own}: {here}; {who}: {there}")
        case Verdict.LOST:
            return PeerGone(f"{who} (process {process}) has ended; it had not arrived at {here}")
        case Verdict.LEFT:
            blamed = _word(memory, outcome.culprit, BLAMED) - 1
            why = f" on account of rank {names[blamed]}" if blamed >= 0 else ""
            return PeerGone(f"{who} has left the group{why}; it had not arrived at {here}")
        case Verdict.TIMED_OUT:
            late = [f"rank {names[rank]}" for rank in _late(memory)] or [who]
            verb = "has" if len(late) == 1 else "have"
            return PeerGone(
                f"{' and '.join(late)} {verb} not arrived at {here} within {call.timeout_s:g} s"
            )
        case _:
            return RuntimeError(f"no shared-memory core for {here}")


def _word(memory: "Memory", rank: int, word: int) -> int:
    at = memory.layout.lane_at(rank) + 4 * word
    return int.from_bytes(memory.buffer[at : at + 4], "little")


def _late(memory: "Memory") -> list[int]:
    """Who is behind this rank's tick."""
    own = _word(memory, memory.rank, ARRIVED)
    others = [rank for rank in range(memory.layout.size) if rank != memory.rank]
    return [r for r in others if (_word(memory, r, ARRIVED) - own) & 0xFFFFFFFF >= 0x80000000]
