"""Where the pieces of each parameter are, as plain index arithmetic.

A piece of a tensor is a box inside its global shape. Along each axis::

    0        offset       offset + shape        global_shape
    |----------[===============)----------------------|

    first = Slice((8, 16), offset=(0, 0), shape=(4, 16))
    first.intersection(Slice((8, 16), (2, 8), (6, 8)))    # [2:4, 8:16] of (8, 16)
    check_cover([first, Slice((8, 16), (4, 0), (4, 16))])
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Slice:
    """The box ``offset[i] <= index[i] < offset[i] + shape[i]`` of a tensor of `global_shape`.

    Raises ValueError where the three have different lengths, hold negative numbers, or the box
    reaches out of the tensor. A box may be empty: an uneven split leaves some ranks nothing.
    """

    global_shape: Shape
    offset: Shape
    shape: Shape

    def __post_init__(self) -> None:
        for name in ("global_shape", "offset", "shape"):
            object.__setattr__(self, name, _shape(name, getattr(self, name)))
        if not len(self.global_shape) == len(self.offset) == len(self.shape):
            raise ValueError(
                f"global_shape {self.global_shape}, offset {self.offset} and shape {self.shape} "
                "must have one number for each dimension"
            )
        for axis, (size, start, stop) in enumerate(
            zip(self.global_shape, self.offset, self.stop, strict=True)
        ):
            if stop > size:
                raise ValueError(
                    f"{start}:{stop} reaches out of dimension {axis}, which has {size} "
                    f"(global shape {self.global_shape})"
                )

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Slice":
        """All of a tensor of this shape."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def stop(self) -> Shape:
        """One past the last index, for each dimension."""
        return tuple(map(operator.add, self.offset, self.shape))

    @property
    def numel(self) -> int:
        """How many elements the box holds."""
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        return self.shape == self.global_shape

    def intersection(self, other: "Slice") -> "Slice | None":
        """The elements that both boxes hold; None where there are none.

        Raises ValueError where the two are boxes of tensors of different shapes.
        """
        self._check_same_tensor(other)
        start = tuple(map(max, self.offset, other.offset))
        shape = tuple(
            min(mine, theirs) - first
            for mine, theirs, first in zip(self.stop, other.stop, start, strict=True)
        )
        return Slice(self.global_shape, start, shape) if all(n > 0 for n in shape) else None

    def index_within(self, outer: "Slice") -> tuple[slice, ...]:
        """How to index this box in a tensor that holds `outer`.

        Raises ValueError where `outer` does not hold all of this box.
        """
        self._check_same_tensor(outer)
        starts = tuple(map(operator.sub, self.offset, outer.offset))
        stops = tuple(map(operator.sub, self.stop, outer.offset))
        if any(n < 0 for n in starts) or any(map(operator.gt, stops, outer.shape)):
            raise ValueError(f"{self} is not inside {outer}")
        return tuple(map(slice, starts, stops))

    def to_json(self) -> dict[str, list[int]]:
        return {
            "global_shape": list(self.global_shape),
            "offset": list(self.offset),
            "shape": list(self.shape),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Slice":
        """Rebuild from :meth:`to_json`; other keys are ignored. Raises ValueError."""
        missing = [key for key in ("global_shape", "offset", "shape") if key not in value]
        if missing:
            raise ValueError(f"a slice needs global_shape, offset and shape: no {missing[0]} here")
        return cls(value["global_shape"], value["offset"], value["shape"])

    def __str__(self) -> str:
        ranges = ", ".join(f"{a}:{b}" for a, b in zip(self.offset, self.stop, strict=True))
        return f"[{ranges}] of {self.global_shape}"

    def _check_same_tensor(self, other: "Slice") -> None:
        if self.global_shape != other.global_shape:
            raise ValueError(
                f"{self} and {other} are slices of tensors of different shapes: "
                f"{self.global_shape} and {other.global_shape}"
            )


@dataclass(frozen=True)
class Part:
    """What one rank holds of a tensor: boxes of it, one after another along `dim`.

    Most parts are one box. A fused weight of queries, keys and values that is cut by heads is
    three: some rows of each third. Raises ValueError where there is no box, they are boxes of
    different tensors, overlap, or do not fit side by side.

        part = Part.of(Slice((6, 4), (0, 0), (1, 4)), Slice((6, 4), (3, 0), (1, 4)))
        part.take(weight)          # rows 0 and 3, [2, 4]
    """

    boxes: tuple[Slice, ...]
    dim: int = 0

    def __post_init__(self) -> None:
        if not self.boxes:
            raise ValueError("a part has one box at least, which may be empty")
        first = self.boxes[0]
        for box in self.boxes[1:]:
            first._check_same_tensor(box)
            if self._across(box) != self._across(first):
                raise ValueError(f"{first} and {box} do not fit side by side along {self.dim}")
        _check_disjoint([box for box in self.boxes if box.numel])

    def _across(self, box: Slice) -> tuple[Shape, Shape]:
        """Where a box lies along all dimensions but `dim`."""
        others = [axis for axis in range(len(box.shape)) if axis != self.dim]
        return tuple(box.offset[a] for a in others), tuple(box.shape[a] for a in others)

    @classmethod
    def whole(cls, shape: Sequence[int]) -> "Part":
        """All of a tensor of this shape."""
        return cls((Slice.whole(shape),))

    @classmethod
    def of(cls, *boxes: Slice, dim: int = 0) -> "Part":
        return cls(boxes, dim)

    @property
    def global_shape(self) -> Shape:
        return self.boxes[0].global_shape

    @property
    def shape(self) -> Shape:
        """The shape of the tensor that holds the part."""
        first = self.boxes[0].shape
        if len(self.boxes) == 1:
            return first
        along = sum(box.shape[self.dim] for box in self.boxes)
        return (*first[: self.dim], along, *first[self.dim + 1 :])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_whole(self) -> bool:
        return len(self.boxes) == 1 and self.boxes[0].is_whole

    def places(self) -> list[tuple[Slice, tuple[slice, ...]]]:
        """Each box, and how to index it in the tensor that holds the part."""
        found, start = [], 0
        for box in self.boxes:
            index = [slice(0, size) for size in box.shape]
            if index:
                stop = start + box.shape[self.dim]
                index[self.dim] = slice(start, stop)
                start = stop
            found.append((box, tuple(index)))
        return found

    def take(self, whole: Any) -> Any:
        """This part of a whole torch tensor, as a new contiguous one."""
        result = whole.new_empty(self.shape)
        origin = Slice.whole(self.global_shape)
        for box, index in self.places():
            result[index] = whole[box.index_within(origin)]
        return result

    def narrow(self, dim: int, start: int, stop: int) -> "Part":
        """The part that ``[start, stop)`` along `dim` of this part's tensor is."""
        if not 0 <= start <= stop <= self.shape[dim]:
            raise ValueError(f"{start}:{stop} reaches out of dimension {dim} of {self.shape}")
        if dim != self.dim or len(self.boxes) == 1:
            return Part(tuple(_narrowed(box, dim, start, stop) for box in self.boxes), self.dim)
        kept, before = [], 0
        for box in self.boxes:
            size = box.shape[dim]
            first, last = max(start - before, 0), min(stop - before, size)
            if first < last:
                kept.append(_narrowed(box, dim, first, last))
            before += size
        return Part(tuple(kept) or (_narrowed(self.boxes[0], dim, 0, 0),), self.dim)

    def to_json(self) -> dict[str, Any]:
        return {"boxes": [box.to_json() for box in self.boxes], "dim": self.dim}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Part":
        """Rebuild from :meth:`to_json`. Raises ValueError."""
        return cls(tuple(Slice.from_json(box) for box in value["boxes"]), int(value["dim"]))

    def __str__(self) -> str:
        return " and ".join(str(box) for box in self.boxes)


def _narrowed(box: Slice, dim: int, start: int, stop: int) -> Slice:
    offset, shape = list(box.offset), list(box.shape)
    offset[dim] += start
    shape[dim] = stop - start
    return Slice(box.global_shape, tuple(offset), tuple(shape))


Layout: TypeAlias = Mapping[str, Part]
"""What one rank holds of each tensor, by qualified name."""


def layout_to_json(layout: Layout) -> dict[str, dict[str, Any]]:
    return {name: part.to_json() for name, part in layout.items()}


def layout_from_json(value: Mapping[str, Any]) -> dict[str, Part]:
    """Rebuild from :func:`layout_to_json`. Raises ValueError that names the tensor."""
    layout = {}
    for name, part in value.items():
        try:
            layout[name] = Part.from_json(part)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    return layout


def check_cover(slices: Iterable[Slice]) -> None:
    """Check that the pieces of one tensor cover it exactly: no hole, no partial overlap.

    Equal slices are replicas of each other and count once; empty ones count nothing. Boxes that
    are disjoint in pairs and have as many elements together as the tensor leave no hole.
    Raises ValueError that names the two that overlap, or how much is not covered.
    """
    given = list(slices)
    if not given:
        raise ValueError("no slice at all")
    for piece in given[1:]:
        given[0]._check_same_tensor(piece)
    pieces = [piece for piece in dict.fromkeys(given) if piece.numel]
    _check_disjoint(pieces)
    covered = sum(piece.numel for piece in pieces)
    needed = math.prod(given[0].global_shape)
    if covered != needed:
        raise ValueError(
            f"{needed - covered} of {needed} elements of a tensor of shape "
            f"{given[0].global_shape} are in no slice"
        )


def _check_disjoint(pieces: list[Slice]) -> None:
    """Sweep along the axis that is cut most: 1,024 shards of one axis take 1,024 comparisons."""
    if len(pieces) < 2:
        return
    axes = range(len(pieces[0].global_shape))
    axis = max(axes, key=lambda a: len({piece.offset[a] for piece in pieces}))
    active: list[Slice] = []
    for piece in sorted(pieces, key=lambda p: p.offset[axis]):
        active = [other for other in active if other.stop[axis] > piece.offset[axis]]
        for other in active:
            if other.intersection(piece) is not None:
                raise ValueError(f"{other} and {piece} overlap")
        active.append(piece)


def _shape(name: str, value: Iterable[Any]) -> Shape:
    try:
        numbers = tuple(operator.index(number) for number in value)
    except TypeError as error:
        raise ValueError(f"{name} must be whole numbers, given {value!r}") from error
    if any(number < 0 for number in numbers):
        raise ValueError(f"{name} must not be negative, given {numbers}")
    return numbers
