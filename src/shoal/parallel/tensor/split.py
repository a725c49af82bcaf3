"""How one dimension of a tensor lies on the ranks: blocks, each of which every rank has a part of.

    a dimension   outer × ( block | block | … )         outer copies of a row of blocks
    a block       0 ── rank 0 ── rank 1 ── … ── size    cut at `bounds`

    hidden channels       Split(1, (Block(512, (0, 256, 512)),))
    fused q, k, v         Split(3, (Block(64, (0, 32, 64)),))       each rank has a part of each
    examples × heads      Split(n, (Block(4, (0, 2, 4)),))

A rank's tensor holds its parts one after another, in the order of the whole one.
"""

from dataclasses import dataclass

LONGEST_ROW = 4096  # copies that are written out as blocks; more is a number of examples


@dataclass(frozen=True)
class Block:
    """`size` elements; rank r has ``bounds[r]:bounds[r + 1]`` of them."""

    size: int
    bounds: tuple[int, ...]

    def times(self, factor: int) -> "Block":
        return Block(self.size * factor, tuple(bound * factor for bound in self.bounds))

    def divided(self, divisor: int) -> "Block | None":
        """None where a part is not a whole number of elements then."""
        if any(number % divisor for number in (self.size, *self.bounds)):
            return None
        return Block(self.size // divisor, tuple(bound // divisor for bound in self.bounds))


@dataclass(frozen=True)
class Split:
    """`outer` copies of a row of blocks; always written with the shortest row (see `made`)."""

    outer: int
    blocks: tuple[Block, ...]

    @classmethod
    def made(cls, outer: int, blocks: tuple[Block, ...]) -> "Split":
        count = len(blocks)
        for period in range(1, count):
            if count % period == 0 and blocks == blocks[:period] * (count // period):
                return cls(outer * (count // period), blocks[:period])
        return cls(outer, blocks)

    @property
    def row(self) -> int:
        return sum(block.size for block in self.blocks)

    @property
    def size(self) -> int:
        return self.outer * self.row

    def local_row(self, rank: int) -> int:
        return sum(block.bounds[rank + 1] - block.bounds[rank] for block in self.blocks)

    def local(self, rank: int) -> int:
        """The size of this dimension on `rank`."""
        return self.outer * self.local_row(rank)

    def times(self, factor: int) -> "Split":
        return Split(self.outer, tuple(block.times(factor) for block in self.blocks))

    def divided(self, divisor: int) -> "Split | None":
        blocks = [block.divided(divisor) for block in self.blocks]
        whole = tuple(block for block in blocks if block is not None)
        return Split(self.outer, whole) if len(whole) == len(blocks) else None

    def resized(self, size: int) -> "Split | None":
        """The same parts of a dimension of another size; None where they fall inside elements."""
        if size == self.size:
            return self
        if size % self.outer:
            return None
        grown = self.times(size // self.outer)
        return grown.divided(self.row)

    def unrolled(self) -> tuple[Block, ...] | None:
        """All blocks, copies written out; None where there are too many."""
        return self.blocks * self.outer if self.outer <= LONGEST_ROW else None

    def ranges(self, rank: int) -> list[tuple[int, int]]:
        """What `rank` has, as ranges of the whole dimension, joined where they touch."""
        found: list[tuple[int, int]] = []
        start = 0
        for block in self.blocks * self.outer:
            first, last = start + block.bounds[rank], start + block.bounds[rank + 1]
            if found and found[-1][1] == first:
                found[-1] = (found[-1][0], last)
            elif first < last:
                found.append((first, last))
            start += block.size
        return found


@dataclass(frozen=True)
class Cut:
    """A value lies on the ranks along `dim` as `split`."""

    dim: int
    split: Split


class CannotCut(Exception):
    """Why an operation cannot work on what is cut."""


def even_bounds(units: int, ranks: int, size: int) -> tuple[int, ...]:
    """Bounds in elements: units as even as they go, the first ranks have one more."""
    share, more = divmod(units, ranks)
    counts = [share + (rank < more) for rank in range(ranks)]
    return tuple(sum(counts[:rank]) * (size // units) for rank in range(ranks + 1))


def in_product(split: Split, factors: list[int]) -> tuple[int, Split] | None:
    """Of a product of `factors` (outer first): the index of the one that is cut, and how."""
    before = 1
    for index, factor in enumerate(factors):
        after = 1
        for other in factors[index + 1 :]:
            after *= other
        if split.outer % before == 0 and factor > 1:
            outer = split.outer // before
            inner = split.divided(after)
            if inner is not None and outer * inner.row == factor:
                return index, Split(outer, inner.blocks)
        before *= factor
    return None


def of_product(split: Split, index: int, factors: list[int]) -> Split:
    """A product of `factors` of which number `index` is cut as `split`."""
    before, after = 1, 1
    for factor in factors[:index]:
        before *= factor
    for factor in factors[index + 1 :]:
        after *= factor
    return Split(split.outer * before, split.times(after).blocks)


def in_row(split: Split, sizes: list[int]) -> list[Split] | None:
    """Of a dimension that is a row of pieces of `sizes`: how each is cut; None where one is not."""
    blocks = split.unrolled()
    if blocks is None:
        return None
    pieces: list[Split] = []
    position = 0
    for size in sizes:
        mine: list[Block] = []
        length = 0
        while length < size and position < len(blocks):
            mine.append(blocks[position])
            length += blocks[position].size
            position += 1
        if length != size:
            return None
        pieces.append(Split.made(1, tuple(mine)))
    return pieces


def of_row(splits: list[Split]) -> Split | None:
    """A row of pieces that are cut as `splits`."""
    blocks: list[Block] = []
    for split in splits:
        unrolled = split.unrolled()
        if unrolled is None:
            return None
        blocks.extend(unrolled)
    return Split.made(1, tuple(blocks))
