"""Where things are in the memory that the ranks of a group share, and how much of it there is.

    lane of rank 0 | lane of rank 1 | … | two slots of rank 0 | two slots of rank 1 | …

    lane   192 bytes: its last tick, who sleeps on it, whether it has left; two headers
    slot   the operands of a chunk (512 KiB), then sums of one rank's part of it

    Layout(2).total_bytes       # 3,146,112: 3 MiB for two ranks, 5 MiB for four

`core.c` has the same places. A chunk and what is done with it should stay in a core's second-level
cache (1 MiB where this was measured): from 256 KiB to 4 MiB a chunk, all-reduces of 4 to 64 MB were
within a tenth of the fastest at 512 KiB and 1 MiB on 2 and 4 ranks, and up to 60 % slower beyond.
"""

import struct
from dataclasses import dataclass

from shoal.comm.shared_memory.call import Call, Kind, Operation, type_name

LANE_BYTES = 192
MAX_RANKS = 64
LINE = 64

# Places of 32-bit words in a lane.
ARRIVED, SLEEPERS, LEFT, BLAMED = range(4)
_HEADERS_AT = 64
_HEADER = struct.Struct("<2Q5I7x7x7x7x")


@dataclass(frozen=True)
class Header:
    """What a rank says of a collective before it gives anything."""

    sequence: int
    count: int
    kind: int
    label: int
    operation: int
    root: int
    item_bytes: int

    @classmethod
    def of(cls, call: Call, sequence: int) -> "Header":
        return cls(
            sequence,
            call.count,
            call.kind,
            call.label,
            call.arithmetic,
            call.root,
            call.item_bytes,
        )

    @classmethod
    def read(cls, memory: memoryview, at: int) -> "Header":
        return cls(*_HEADER.unpack_from(memory, at))

    def write(self, memory: memoryview, at: int) -> None:
        _HEADER.pack_into(
            memory,
            at,
            self.sequence,
            self.count,
            self.kind,
            self.label,
            self.operation,
            self.root,
            self.item_bytes,
        )

    def __str__(self) -> str:
        """``collective 7, all_reduce (sum) of 12 float32``."""
        text = f"collective {self.sequence}, {Kind(self.kind).name.lower()}"
        if self.kind in (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER):
            text += f" ({Operation(self.operation).name.lower()})"
        if self.kind == Kind.BROADCAST:
            text += f" from rank {self.root} of the group"
        if self.kind != Kind.BARRIER:
            text += f" of {self.count} {type_name(self.label)}"
        return text


@dataclass(frozen=True)
class Layout:
    """Sizes for a group of `size` ranks, in bytes."""

    size: int
    chunk_bytes: int = 512 * 1024
    single_bytes: int = 32 * 1024

    @property
    def slot_bytes(self) -> int:
        """Operands of a chunk, then the sums of one part of it (parts are whole cache lines)."""
        part = -(-self.chunk_bytes // self.size)
        return self.chunk_bytes + -(-part // LINE) * LINE

    @property
    def total_bytes(self) -> int:
        return self.size * (LANE_BYTES + 2 * self.slot_bytes)

    def lane_at(self, rank: int) -> int:
        return rank * LANE_BYTES

    def header_at(self, rank: int, sequence: int) -> int:
        return rank * LANE_BYTES + _HEADERS_AT + (sequence & 1) * _HEADER.size

    def slot_at(self, rank: int, tick: int) -> int:
        return self.size * LANE_BYTES + (2 * rank + (tick & 1)) * self.slot_bytes
