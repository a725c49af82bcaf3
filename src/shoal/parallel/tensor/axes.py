"""Which dimensions carry the same index: a union-find whose elements can be taken apart.

    axis        one dimension of one tensor: outer × ( atom | atom | … )
    atom        an index that several dimensions share, in units that may not be divided
    unify       two axes are the same: their atoms are joined one by one, longer ones taken apart

A fused weight of q, k and v starts as one atom of 3·H·D rows. A split takes it into three; a view
to [H, D] makes H units of each; the product of q and k joins two of them.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import gcd

LIMIT = 256  # refinements of one pair of axes: more would not end


class Atom:
    """`units`: the number of equal parts that a cut may fall between."""

    def __init__(self, units: int) -> None:
        self.units = units
        self.veto: str | None = None
        self.joined: Atom | None = None
        self.parts: list[tuple[Fraction, Atom]] | None = None

    def root(self) -> "Atom":
        atom = self
        while atom.joined is not None:
            atom = atom.joined
        if self is not atom:
            self.joined = atom
        return atom

    def forbid(self, why: str) -> None:
        root = self.root()
        if root.parts is not None:
            for _, part in root.parts:
                part.forbid(why)
        root.veto = root.veto or why

    def coarsen(self, units: int) -> None:
        """Cuts may fall only where `units` equal parts meet as well."""
        root = self.root()
        if root.parts is None:
            root.units = gcd(root.units, units)
            return
        for share, part in root.parts:
            mine = share * units
            part.coarsen(int(mine) if mine.denominator == 1 else 1)

    def refine(self, at: Fraction) -> None:
        """Take it apart at the fraction `at` of its length."""
        parts = []
        for share in (at, 1 - at):
            mine = share * self.units
            part = Atom(int(mine) if mine.denominator == 1 else 1)
            part.veto = self.veto
            parts.append((share, part))
        self.parts = parts


def join(first: Atom, second: Atom) -> None:
    """The two atoms (roots without parts) are the same index."""
    first, second = first.root(), second.root()
    if first is second:
        return
    second.joined = first
    first.units = gcd(first.units, second.units)
    first.veto = first.veto or second.veto


@dataclass
class Axis:
    """`outer` copies of a row of ``(size in elements, atom)``."""

    outer: int
    row: list[tuple[int, Atom]]

    @classmethod
    def fresh(cls, size: int) -> "Axis":
        return cls(1, [(size, Atom(size))])

    @property
    def row_size(self) -> int:
        return sum(size for size, _ in self.row)

    @property
    def size(self) -> int:
        return self.outer * self.row_size

    def expand(self) -> list[tuple[int, Atom]]:
        """The row in atoms that are whole; one with a part of no whole elements is vetoed."""
        found: list[tuple[int, Atom]] = []
        todo = list(reversed(self.row))
        while todo:
            size, atom = todo.pop()
            root = atom.root()
            if root.parts is None:
                found.append((size, root))
                continue
            exact = all((share * size).denominator == 1 for share, _ in root.parts)
            if not exact:
                root.forbid("its parts do not fall on whole elements everywhere")
            lengths = [int(share * size) for share, _ in root.parts]
            lengths[-1] = size - sum(lengths[:-1])
            parts = [part for _, part in root.parts]
            todo.extend(reversed(list(zip(lengths, parts, strict=True))))
        self.row = found
        return found

    def copies(self) -> int:
        """How often its shortest row is repeated."""
        row = [(size, id(atom)) for size, atom in self.expand()]
        for period in range(1, len(row)):
            if len(row) % period == 0 and row == row[:period] * (len(row) // period):
                return self.outer * (len(row) // period)
        return self.outer

    def atoms(self) -> list[Atom]:
        return [atom for _, atom in self.expand()]

    def forbid(self, why: str) -> None:
        for atom in self.atoms():
            atom.forbid(why)

    @property
    def veto(self) -> str | None:
        return next((atom.veto for atom in self.atoms() if atom.veto), None)

    def coarsen(self, units: int) -> None:
        """Cuts fall between `units` equal parts of the whole axis only."""
        total = self.row_size
        if units % self.outer:
            self.forbid("its groups do not fit its copies")
            return
        units //= self.outer
        for size, atom in self.expand():
            mine = Fraction(size * units, total)
            atom.coarsen(int(mine) if mine.denominator == 1 else 1)

    def times(self, before: int, after: int) -> "Axis":
        """The axis of a product: `before` copies outside, `after` elements inside of each."""
        return Axis(self.outer * before, [(size * after, atom) for size, atom in self.expand()])


def unify(first: Axis, second: Axis) -> None:
    """The two axes carry the same index; they may differ in size, in proportion then."""
    if first is second:
        return
    if not _same_copies(first, second):
        first.forbid("it is repeated in different ways")
        second.forbid("it is repeated in different ways")
        return
    for _ in range(LIMIT):
        if _aligned(first, second):
            return
    for axis in (first, second):
        axis.forbid("it is taken apart without end")


def _same_copies(first: Axis, second: Axis) -> bool:
    if first.outer == second.outer:
        return True
    more, less = (first, second) if first.outer > second.outer else (second, first)
    copies, rest = divmod(more.outer, less.outer)
    if rest or copies > LIMIT:
        return False
    more.row = more.expand() * copies
    more.outer = less.outer
    return True


def _aligned(first: Axis, second: Axis) -> bool:
    """Join atoms from the front; False after one had to be taken apart."""
    mine, theirs = first.expand(), second.expand()
    total, other = first.row_size, second.row_size
    if not total or not other:
        return True
    for (size, atom), (size_too, atom_too) in zip(mine, theirs, strict=False):
        length, length_too = Fraction(size, total), Fraction(size_too, other)
        if length == length_too:
            if atom.root().parts is not None or atom_too.root().parts is not None:
                return False
            join(atom, atom_too)
            continue
        if length > length_too:
            atom.root().refine(length_too / length)
        else:
            atom_too.root().refine(length / length_too)
        return False
    return True
