"""Sums of tensors over replicas, as they are sent: in full, in fewer bits, or in part.

    full       [ float32 … ]                        all-reduce
    fp16 bf16  [ 16 bits … ]                        all-reduce, added in 16 bits
    int8       [ int8 … | a scale for 256 ]         all-gather, added in the tensors' own type
    topk       [ largest values | their places ]    all-gather, the rest is kept for the next time
    powersgd   [ P ]  then  [ Q ]                   two all-reduces, the rest is kept likewise

    sums = sums_of(Compress("topk", 1), Line(group, "gradient"))
    under_way = sums.start({"fc.weight": gradient, "fc.bias": other})
    under_way.wait()                     # both are the sums now, the same bits on every rank

What is sent of a tensor depends on that tensor alone, never on its neighbours in a message: ranks
that hold the same part of a layer and other parts of the next one then stay equal.

torch's communication hooks of DDP (`fp16_compress_hook`, `powerSGD_hook`) are not used: they take
a `GradBucket`, which only DDP can make (it has no constructor; `every_step` says why there is no
DDP), know no replicas without examples, keep their errors by the place in a bucket, where a
checkpoint has no name for them, and pack the tensors of a bucket together.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shoal.comm import Group, Pending
from shoal.comm.counter import Purpose
from shoal.sync.average import PIECE_BYTES, pieces


@dataclass(frozen=True)
class Line:
    """Who sums what for which purpose.

    ``replica``: its number, where checkpoints keep all replicas' errors under one name; None where
    each has names of its own. ``place``: this rank's in its replica.
    """

    group: Group
    purpose: Purpose
    replica: int | None = None
    place: int = 0

    @property
    def error_key(self) -> str:
        """What the errors of this replica are called: they are cut like the parameter."""
        return "sync.error" if self.replica is None else f"sync.error.{self.replica}"

    def own_key(self, key: str) -> str:
        """The name of something that is this rank's alone of its replica, of whatever shape."""
        return f"sync.{key}@{self.place}"


class UnderWay(Protocol):
    """Sums that were started."""

    @property
    def began(self) -> float: ...
    @property
    def ended(self) -> float | None: ...

    def wait(self) -> None:
        """Returns when the tensors that were given are the sums."""


class Sums(Protocol):
    """One way of sending."""

    def start(self, named: Mapping[str, Tensor], used: Collection[str] | None = None) -> UnderWay:
        """Start to sum, in place, tensors that no one else changes meanwhile. Collective.

        ``used``: the names for which this rank has something to add, None for all; the others are
        zeros, and what was kept of them is not touched.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """What is kept from one sum to the next: ``fc.weight/sync.error``."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from :meth:`state`; what is missing begins anew."""


class Stateless:
    """Nothing is kept between sums."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        return


class Several:
    """Messages that are under way, one after another; `close` brings each into its tensors."""

    def __init__(self) -> None:
        self._pending: list[Pending] = []
        self._tensors: list[Sequence[Tensor]] = []
        self.began = 0.0
        self.ended: float | None = None

    def add(self, pending: Pending, tensors: Sequence[Tensor]) -> None:
        self.began = self.began or pending.began
        self._pending.append(pending)
        self._tensors.append(tensors)

    def totals(self, sent: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The sums, flat, from what has arrived."""
        return sent

    def wait(self) -> None:
        with torch.no_grad():
            for pending, tensors in zip(self._pending, self._tensors, strict=True):
                spread(self.totals(pending.wait(), tensors), tensors)
        if self._pending:
            self.ended = self._pending[-1].ended
        self._pending, self._tensors = [], []


class Full(Stateless):
    """All of it, as it is; or rounded to ``dtype`` of 16 bits."""

    def __init__(self, line: Line, dtype: torch.dtype | None = None) -> None:
        self._line, self._dtype = line, dtype

    def start(self, named: Mapping[str, Tensor], used: Collection[str] | None = None) -> UnderWay:
        under_way = Several()
        for piece in pieces(list(named.values()), PIECE_BYTES):
            flat = flat_of(piece)
            flat = flat if self._dtype is None else flat.to(self._dtype)
            under_way.add(self._line.group.all_reduce_later(flat, self._line.purpose), piece)
        return under_way


BLOCK = 256


class Quantised(Stateless):
    """Bytes, with a scale for each `BLOCK` numbers of a tensor (the last block may be shorter).

        x ≈ scale · q,   q = round(x / scale) in −127 … 127,   scale = max |x| / 127, in bf16

    Every rank gets every other's bytes and adds them up in the tensors' own type: sums of bytes
    would need wider ones on the way, and scales in common another exchange first.
    """

    def __init__(self, line: Line) -> None:
        self._line = line

    def start(self, named: Mapping[str, Tensor], used: Collection[str] | None = None) -> UnderWay:
        under_way = _Bytes()
        for piece in pieces(list(named.values()), PIECE_BYTES):
            message = torch.cat([part for tensor in piece for part in quantise(tensor)])
            under_way.add(self._line.group.all_gather_later(message, self._line.purpose), piece)
        return under_way


class _Bytes(Several):
    def totals(self, sent: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(
            sum(t.numel() for t in tensors), dtype=tensors[0].dtype, device=tensors[0].device
        )
        for message in sent:
            start = place = 0
            for tensor in tensors:
                count, blocks = tensor.numel(), -(-tensor.numel() // BLOCK)
                middle, stop = start + count, start + count + 2 * blocks
                values = dequantise(message[start:middle], message[middle:stop], total.dtype)
                total[place : place + count] += values
                start, place = stop, place + count
        return total


def quantise(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers as bytes, [n], and their scales as bytes, [2 · blocks]."""
    flat = tensor.detach().reshape(-1)
    rows = _in_blocks(flat)
    scales = (rows.abs().amax(1) / 127).to(torch.bfloat16)
    divisors = scales.to(flat.dtype).masked_fill_(scales == 0, 1.0).unsqueeze(1)
    # bf16 may have rounded the scale down: the largest number is then 127 all the same.
    whole = (rows / divisors).round_().clamp_(-127, 127).to(torch.int8)
    return whole.reshape(-1)[: flat.numel()].view(torch.uint8), scales.view(torch.uint8)


def dequantise(whole: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What :func:`quantise` has made, as numbers, [n]."""
    rows = _in_blocks(whole.view(torch.int8).to(dtype))
    # A copy: a view of two bytes as one number has to begin at an even place.
    factors = scales.clone().view(torch.bfloat16).to(dtype)
    return (rows * factors.unsqueeze(1)).reshape(-1)[: whole.numel()]


def _in_blocks(flat: Tensor) -> Tensor:
    blocks = -(-flat.numel() // BLOCK)
    padded = flat.new_zeros(blocks * BLOCK)
    padded[: flat.numel()] = flat
    return padded.view(blocks, BLOCK)


def flat_of(tensors: Sequence[Tensor]) -> Tensor:
    """All their numbers, one after another."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Put numbers that lie one after another into tensors."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view(tensor.shape))
