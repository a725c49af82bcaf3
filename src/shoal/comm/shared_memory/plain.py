"""The core in plain Python and torch, where the C library was not built: the same ticks and slots.

PlainCore(memory).run(call)

Its words in memory are read and written by CPython's single 4-byte moves. That x86-64 keeps the
order of one core's stores, and of its loads, is what makes this sound there, and only there: other
processors use gloo when there is no C library. It polls, with growing sleeps, as there is no futex.
"""

import os
import platform
import select
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shoal.comm.shared_memory.call import Call, Kind, Operation
from shoal.comm.shared_memory.failure import CannotShare
from shoal.comm.shared_memory.layout import (
    ARRIVED,
    BLAMED,
    LANE_BYTES,
    LEFT,
    LINE,
    Header,
)
from shoal.comm.shared_memory.outcome import Outcome, Verdict

if TYPE_CHECKING:
    from shoal.comm.shared_memory.memory import Memory

NAME = "Python"
SPINS = 200
LOOK_EVERY_S = 0.05
LONGEST_SLEEP_S = 0.0005

_COMBINE: dict[Operation, Callable[[Tensor, Tensor], Tensor]] = {
    Operation.SUM: torch.add,
    Operation.AVERAGE: torch.add,
    Operation.PRODUCT: torch.mul,
    Operation.MINIMUM: torch.minimum,
    Operation.MAXIMUM: torch.maximum,
}


def check_processor() -> None:
    """Raise `CannotShare` where plain loads and stores may change places."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise CannotShare(f"the C library is not there, and {platform.machine()} needs it")


class _Ended(Exception):
    def __init__(self, verdict: Verdict, culprit: int) -> None:
        self.outcome = Outcome(verdict, culprit)


class PlainCore:
    """Runs collectives over a group's memory, in Python."""

    def __init__(self, memory: "Memory") -> None:
        self._layout = memory.layout
        self._rank, self._size = memory.rank, memory.layout.size
        self._bytes = memoryview(memory.buffer)
        self._words = self._bytes[: self._size * LANE_BYTES].cast("I")
        self._tensor = torch.frombuffer(memory.buffer, dtype=torch.uint8)
        self._others = [rank for rank in range(self._size) if rank != self._rank]
        self._may_spin = memory.cores >= self._size
        self._poll = select.poll()
        self._of_fd = {memory.process_fds[rank]: rank for rank in self._others}
        for descriptor in self._of_fd:
            if descriptor >= 0:
                self._poll.register(descriptor, select.POLLIN)
        self._sequence = 0
        self._tick = 0

    @property
    def sequence(self) -> int:
        """How many collectives there have been."""
        return self._sequence

    def run(self, call: Call) -> Outcome:
        """Run one collective, and wait for its end."""
        self._sequence += 1
        at = self._layout.header_at(self._rank, self._sequence)
        Header.of(call, self._sequence).write(self._bytes, at)
        run = {
            Kind.ALL_REDUCE: self._all_reduce,
            Kind.REDUCE_SCATTER: self._reduce_scatter,
            Kind.ALL_GATHER: self._all_gather,
            Kind.BROADCAST: self._broadcast,
            Kind.BARRIER: self._barrier,
        }[call.kind]
        try:
            run(call)
        except _Ended as ended:
            return ended.outcome
        return Outcome(Verdict.OK, self._rank)

    def leave(self, blamed: int) -> None:
        """Say that this rank will arrive nowhere any more; ``blamed``: for whose sake, or -1."""
        self._set(BLAMED, blamed + 1)
        self._set(LEFT, 1)

    # ---- waiting

    def _word(self, rank: int, word: int) -> int:
        return self._words[rank * LANE_BYTES // 4 + word]

    def _set(self, word: int, value: int) -> None:
        self._words[self._rank * LANE_BYTES // 4 + word] = value

    def _arrived(self, rank: int) -> bool:
        return (self._word(rank, ARRIVED) - self._tick) & 0xFFFFFFFF < 0x80000000

    def _exchange(self, call: Call, *, first: bool) -> None:
        """Give what is in the own slot, get what is in the others'."""
        self._set(ARRIVED, self._tick)
        for rank in self._others:
            if not self._arrived(rank):
                self._wait_for(rank, call.timeout_s)
        if first:
            own = self._header(self._rank)
            for rank in self._others:
                if self._header(rank) != own:
                    raise _Ended(Verdict.DIFFERS, rank)

    def _header(self, rank: int) -> Header:
        return Header.read(self._bytes, self._layout.header_at(rank, self._sequence))

    def _wait_for(self, rank: int, timeout_s: float) -> None:
        for _ in range(SPINS if self._may_spin else 1):
            if self._arrived(rank):
                return
            os.sched_yield()
        begun = looked = time.monotonic()
        sleep_s = 20e-6
        while not self._arrived(rank):
            time.sleep(sleep_s)
            sleep_s = min(sleep_s * 1.5, LONGEST_SLEEP_S)
            now = time.monotonic()
            if now - looked > LOOK_EVERY_S:
                looked = now
                self._look_for_the_lost()
            if now - begun > timeout_s and not self._arrived(rank):
                raise _Ended(Verdict.TIMED_OUT, rank)

    def _look_for_the_lost(self) -> None:
        """What a rank gave before it went is still there: only who has not arrived is missed."""
        for descriptor, _ in self._poll.poll(0):
            rank = self._of_fd[descriptor]
            if not self._arrived(rank):
                raise _Ended(Verdict.LOST, rank)
        for rank in self._others:
            if self._word(rank, LEFT) and not self._arrived(rank):
                raise _Ended(Verdict.LEFT, rank)

    # ---- collectives

    def _next_slot(self) -> None:
        self._tick = (self._tick + 1) & 0xFFFFFFFF

    def _slot(self, rank: int, like: Tensor, start: int, count: int, tick: int = 0) -> Tensor:
        """`count` elements of a rank's slot from byte `start` on, of this tick or one later."""
        at = self._layout.slot_at(rank, self._tick + tick) + start
        return self._tensor[at : at + count * like.element_size()].view(like.dtype)

    def _reduce(self, call: Call, operands: list[Tensor]) -> Tensor:
        """In rank order; bfloat16 and float16 in float32, rounded once by who stores the result."""
        wide = operands[0].dtype in (torch.bfloat16, torch.float16)
        total = operands[0].float() if wide else operands[0]
        for operand in operands[1:]:
            total = _COMBINE[call.arithmetic](total, operand.float() if wide else operand)
        return total / self._size if call.arithmetic == Operation.AVERAGE else total

    def _pieces(self, count: int, most: int) -> Iterator[tuple[int, int]]:
        """Parts of at most `most` elements; an empty one where there are none."""
        for start in range(0, max(count, 1), most):
            yield start, min(most, count - start)

    def _barrier(self, call: Call) -> None:
        self._next_slot()
        self._exchange(call, first=True)

    def _broadcast(self, call: Call) -> None:
        values = flat(call.outputs[0])
        most = self._layout.slot_bytes // call.item_bytes
        for start, count in self._pieces(len(values), most):
            self._next_slot()
            part = values[start : start + count]
            if self._rank == call.root:
                self._slot(self._rank, part, 0, count).copy_(part)
            self._exchange(call, first=start == 0)
            if self._rank != call.root:
                part.copy_(self._slot(call.root, part, 0, count))

    def _all_gather(self, call: Call) -> None:
        own = flat(call.inputs[0])
        outputs = [flat(output) for output in call.outputs]
        most = self._layout.slot_bytes // call.item_bytes
        for start, count in self._pieces(len(own), most):
            self._next_slot()
            self._slot(self._rank, own, 0, count).copy_(own[start : start + count])
            self._exchange(call, first=start == 0)
            for rank, output in enumerate(outputs):
                output[start : start + count].copy_(self._slot(rank, own, 0, count))

    def _reduce_scatter(self, call: Call) -> None:
        inputs, output = [flat(each) for each in call.inputs], flat(call.outputs[0])
        piece = self._layout.slot_bytes // self._size // LINE * LINE
        for start, count in self._pieces(len(output), piece // call.item_bytes):
            self._next_slot()
            for rank in self._others:
                part = inputs[rank][start : start + count]
                self._slot(self._rank, part, rank * piece, count).copy_(part)
            self._exchange(call, first=start == 0)
            operands = [
                self._slot(rank, output, self._rank * piece, count) for rank in range(self._size)
            ]
            operands[self._rank] = inputs[self._rank][start : start + count]
            output[start : start + count].copy_(self._reduce(call, operands))

    def _all_reduce(self, call: Call) -> None:
        """Chunk by chunk, each rank summing its part of it: two ticks a chunk."""
        values, output = flat(call.inputs[0]), flat(call.outputs[0])
        most = self._layout.chunk_bytes // call.item_bytes
        for start, count in self._pieces(len(values), most):
            chunk, into = values[start : start + count], output[start : start + count]
            self._next_slot()
            self._slot(self._rank, chunk, 0, count).copy_(chunk)
            self._exchange(call, first=start == 0)
            if count * call.item_bytes <= self._layout.single_bytes:
                everyones = [self._slot(rank, chunk, 0, count) for rank in range(self._size)]
                into.copy_(self._reduce(call, everyones))
                continue
            part = -(-count // self._size)
            cuts = [min(count, rank * part) for rank in range(self._size + 1)]
            low, high = cuts[self._rank], cuts[self._rank + 1]
            operands = [self._slot(r, chunk, 0, count)[low:high] for r in range(self._size)]
            total = self._reduce(call, operands)
            self._next_slot()
            self._slot(self._rank, chunk, 0, high - low).copy_(total)
            self._exchange(call, first=False)
            for rank in range(self._size):
                low, high = cuts[rank], cuts[rank + 1]
                into[low:high].copy_(self._slot(rank, chunk, 0, high - low))


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they are stored; bool as bytes."""
    stored = tensor.detach().as_strided((tensor.numel(),), (1,))
    return stored.view(torch.uint8) if stored.dtype == torch.bool else stored
