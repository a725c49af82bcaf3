"""Which elements drop: a hash of (seed, step, name of the call, global row, global element).

    dropped(key, "blocks.0.drop#0", (8, 16), 0.1, device=device)        # bool, [8, 16]

The mixing function is splitmix64's finaliser (Steele, Lea & Flood 2014), on int64 tensors. Elements
are numbered within their example, in the order in which they lie in memory:

    tensor [R·n, a, b], R local rows of n positions each       element = (position · A + i) · B + j

where A, B are the sizes of the whole tensor, of which a `Cut` may be here (tensor parallelism).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from shoal.parallel.randomness.key import StepKey, hashed, signed

_RANGE = 1 << 24
_PIECE = 1 << 17  # numbers at once: as fast as torch's own dropout, measured on one core

FIND: Final = -1  # the dimension of the rows is the one that fits their number


class Cut(NamedTuple):
    """Here are positions ``offset, …`` of `size` in all, along `dim`, of a larger tensor.

    In the dimension of the rows, offset and size count positions of one example. ``ranges``: the
    positions (start, stop), where they are not one range.
    """

    dim: int
    offset: int
    size: int
    ranges: tuple[tuple[int, int], ...] = ()

    def positions(self, count: int, device: torch.device) -> Tensor:
        """Where the `count` positions here are in the larger tensor."""
        if not self.ranges:
            return torch.arange(self.offset, self.offset + count, device=device)
        return torch.cat([torch.arange(*each, device=device) for each in self.ranges])


@dataclass(frozen=True)
class Place:
    """Where a tensor's rows are, a dimension, None (it has none) or `FIND`; and its cut."""

    rows_at: int | None = FIND
    cut: Cut | None = None


ANYWHERE = Place()


def dropped(
    key: StepKey,
    name: str,
    shape: Sequence[int],
    probability: float,
    *,
    device: torch.device,
    place: Place = ANYWHERE,
) -> Tensor:
    """Which elements of a tensor of `shape` drop: bool, of that shape.

    ``name`` names the call within the step. A tensor without rows has one mask for all ranks; one
    whose rows are not found has a mask for each rank, which depends on the split.
    """
    at = find_rows(key, shape) if place.rows_at == FIND else place.rows_at
    if at is not None and (key.rows is None or not len(key.rows) or shape[at] % len(key.rows)):
        at, name = None, f"{name}@rank {key.rank}"
    elif at is None and place.rows_at == FIND and list(shape[:1]) != [1]:
        name = f"{name}@rank {key.rank}"
    if at is None:
        rows, order = torch.zeros(1, dtype=torch.int64), list(range(len(shape)))
        sizes = [1, *shape]
    else:
        assert key.rows is not None
        rows, order = key.rows, [at, *(dim for dim in range(len(shape)) if dim != at)]
        sizes = [shape[at] // len(rows), *(shape[dim] for dim in order[1:])]
    axis = None
    if place.cut is not None and place.cut.dim in order:
        axis = order.index(place.cut.dim) + (at is None)
    rows = rows.to(device)
    elements = _numbers(sizes, axis, place.cut, device) if axis is not None else math.prod(sizes)
    found = chosen(hashed(key.seed, key.step, name), rows, elements, probability)
    found = found.view([shape[dim] for dim in order])
    return found.movedim(0, at) if at else found


def find_rows(key: StepKey, shape: Sequence[int]) -> int | None:
    """The first dimension, if it has as many positions for each row; else one that is the rows."""
    count = len(key.rows) if key.rows is not None else 0
    if not count or not shape:
        return None
    if shape[0] % count == 0:
        return 0
    return next((dim for dim, size in enumerate(shape) if size == count), None)


def _numbers(sizes: list[int], axis: int, cut: Cut | None, device: torch.device) -> Tensor:
    """The whole tensor's numbers of the elements of the piece: int64, flat."""
    assert cut is not None
    whole = [cut.size if index == axis else size for index, size in enumerate(sizes)]
    numbers = torch.zeros((), dtype=torch.int64, device=device)
    for index, size in enumerate(sizes):
        here = cut.positions(size, device) if index == axis else torch.arange(size, device=device)
        numbers = numbers[..., None] + here * math.prod(whole[index + 1 :])
    return numbers.flatten()


def chosen(key: int, rows: Tensor, elements: int | Tensor, probability: float) -> Tensor:
    """Which elements of each row a chance of `probability` hits: bool ``[len(rows), elements]``.

    A row's choice depends on its number, its elements' numbers and the key (64 bits, signed) alone.
    ``elements``: their numbers (int64, flat), or how many there are, from 0.
    """
    if isinstance(elements, int):
        elements = torch.arange(elements, device=rows.device)
    golden = signed(0x9E3779B97F4A7C15)
    counters, row_keys = (elements + 1) * golden, _mix((rows + 1) * golden + key)
    result = torch.empty(len(rows), len(elements), dtype=torch.bool, device=rows.device)
    # Numbers of 64 bits are needed for a mask of one: in pieces that stay in a core's cache.
    budget = _PIECE if rows.device.type == "cpu" else 64 * _PIECE
    width = max(1, min(len(elements), budget))
    height = max(1, budget // width)
    below = round(probability * _RANGE)
    for top in range(0, len(rows), height):
        for left in range(0, len(elements), width):
            part = (slice(top, top + height), slice(left, left + width))
            bits = _mix(row_keys[part[0], None] + counters[None, part[1]]) >> 40
            torch.lt(bits & (_RANGE - 1), below, out=result[part])
    return result


def bits(key: int, rows: Tensor, elements: int) -> Tensor:
    """64 random bits for each element of each row, as int64 ``[len(rows), elements]``."""
    golden = signed(0x9E3779B97F4A7C15)
    counters = (torch.arange(elements, device=rows.device) + 1) * golden
    return _mix(_mix((rows + 1) * golden + key)[:, None] + counters)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, element-wise; shifts of int64 are arithmetic, hence the masks."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)
