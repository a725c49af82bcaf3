"""What an operation of the graph does with its dimensions, said once for planning and rewriting.

Every dimension of an operand or a result is made of *labels*, as in einsum, but one may be
a product of labels (outer first) or a row of them:

    linear     x [b, k], weight [o, k], bias [o]  →  [b, o]            sums over k
    view       [b, (h·d)]                         →  [b, h, d]         a product
    cat        [b, p], [b, q]                     →  [b, (p | q)]      a row

A label may be cut over the ranks unless it is `fixed`. Where labels that are summed over are cut,
each rank has a partial sum.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.fx import Node


@dataclass(frozen=True)
class Term:
    """One dimension: a product or a row of labels; of no label where its size is 1."""

    kind: Literal["product", "row"]
    labels: tuple[int, ...]


NOTHING = Term("product", ())
Terms = tuple[Term, ...]


@dataclass
class Operand:
    """A tensor that an operation reads: the argument's name, and the index where it is a list."""

    name: str
    index: int | None
    node: Node
    terms: Terms


@dataclass
class Relation:
    """Labels of one operation.

    ``units``: a label may be cut only between so many equal parts (groups of a convolution).
    ``dropped``: labels of elements that no result has.
    ``added``: the operand that joins after a sum (a bias). ``kept``: operands that must come as
    they are (statistics written to in place). ``adjust(local)`` gives new arguments on a rank.
    ``special`` names a rewriting of its own.
    """

    operands: list[Operand] = field(default_factory=list)
    results: list[Terms] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    sums: set[int] = field(default_factory=set)
    fixed: dict[int, str] = field(default_factory=dict)
    units: dict[int, int] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)
    added: str | None = None
    kept: tuple[str, ...] = ()
    adjust: "Adjust | None" = None
    special: str | None = None
    mean_over: int = 1
    macs: int = 0

    def label(self, size: int) -> Term:
        """A new label, as a dimension by itself; none for a size of 1."""
        if size == 1:
            return NOTHING
        number = len(self.sizes)
        self.sizes[number] = size
        return Term("product", (number,))

    def axes(self, sizes: Iterable[int]) -> list[Term]:
        return [self.label(size) for size in sizes]

    def fix(self, terms: Iterable[Term], why: str) -> None:
        for term in terms:
            for label in term.labels:
                self.fixed.setdefault(label, why)

    def sum_over(self, *terms: Term) -> None:
        for term in terms:
            self.sums.update(term.labels)


@dataclass(frozen=True)
class Local:
    """What an adjustment is told of this rank.

    ``cut``: labels that are cut, with their local sizes. ``results[i][d]``: the local size of
    dimension d of result i, None where it is whole. ``scaled(argument, i, d)``: a global size of
    that dimension, a number or a node, as this rank's.
    """

    cut: dict[int, int]
    sizes: dict[int, int]
    units: dict[int, int]
    results: list[list[int | None]]
    scaled: Callable[[Any, int, int], Any]

    def units_of(self, label: int) -> int:
        """How many of a label's units this rank has."""
        return self.units[label] * self.cut[label] // self.sizes[label]


Adjust = Callable[[dict[str, Any], Local], None]
"""Changes arguments (by name) in place; may set "target" to another operation."""
