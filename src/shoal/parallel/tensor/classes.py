"""Classes of dimensions that must be cut together, found in a graph.

1  every dimension of every value gets an axis; the rules of the operations unify them
2  products (reshapes) are settled: which factor carries the cut. One that is vetoed cannot;
   of several the outermost does (heads before the width of a head)
3  atoms that lie in one row share a fate; a fate is a class

found = find_classes(graph, state)         # {class: {parameter: (dim, row of atoms)}}
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from operator import getitem
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from shoal.parallel.tensor.axes import Atom, Axis, unify
from shoal.parallel.tensor.calls import overload_name
from shoal.parallel.tensor.relate import relate
from shoal.parallel.tensor.relation import Relation, Term
from shoal.parallel.tensor.sizes import is_symbolic, shape

Axes = list[Axis]


@dataclass
class Product:
    """`whole` is the product of `parts`, outer first."""

    whole: Axis
    parts: list[Axis]
    settled: bool = False


@dataclass
class Class:
    """Dimensions with one fate. ``veto``: why they stay whole, if they must.

    ``tensors``: placeholder → (dim, axis). ``units``: the fewest of any of its atoms.
    """

    number: int
    tensors: dict[str, tuple[int, Axis]] = field(default_factory=dict)
    units: int = 0
    veto: str | None = None
    conflicts: set[int] = field(default_factory=set)


class Analysis:
    """Axes of all values of one graph."""

    def __init__(self, graph: Graph, state: dict[str, str], examples: set[str]) -> None:
        self.graph = graph
        self.state = state
        self.axes: dict[Node, list[Axes]] = {}
        self.products: list[Product] = []
        self._later: list[tuple[Axis, Axis]] = []
        self.relations: dict[Node, Relation] = {}
        self._examples = examples
        self._tied: dict[str, Axes] = {}
        for node in graph.nodes:
            self._visit(node)
        self._settle()

    def _visit(self, node: Node) -> None:
        if node.op == "placeholder":
            self._placeholder(node)
        elif node.op == "call_function":
            self._operation(node)

    def _placeholder(self, node: Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return
        name = self.state.get(node.name, node.name)
        if name in self._tied:
            self.axes[node] = [self._tied[name]]
            return
        axes = self._tied[name] = _fresh(value)
        if node.name in self._examples and axes:
            axes[0].forbid("it counts examples")
        self.axes[node] = [axes]

    def _operation(self, node: Node) -> None:
        value = node.meta.get("val")
        if node.target is getitem:
            source = self.axes.get(node.args[0])  # type: ignore[arg-type]
            if source is not None and isinstance(value, Tensor):
                self.axes[node] = [source[node.args[1]]]  # type: ignore[index]
            return
        inputs = [given for given in node.all_input_nodes if given in self.axes]
        if not isinstance(value, Tensor | list | tuple):
            if overload_name(node)[0] != "sym_size":
                self._whole(inputs, node)
            return
        relation = relate(node) if inputs else None
        if relation is None:
            self._whole(inputs, node)
            self.axes[node] = [_fresh(each) for each in _tensors(value)]
            if inputs:
                for axis in self._all(node):
                    axis.forbid(_no_rule(node))
            return
        self.relations[node] = relation
        self._relate(node, relation)

    def _whole(self, nodes: list[Node], user: Node) -> None:
        for each in nodes:
            for axis in self._all(each):
                axis.forbid(_no_rule(user))

    def _all(self, node: Node) -> Iterator[Axis]:
        for axes in self.axes[node]:
            yield from axes

    def _relate(self, node: Node, relation: Relation) -> None:
        labels: dict[int, Axis] = {}
        for operand in relation.operands:
            for term, axis in zip(operand.terms, self.axes[operand.node][0], strict=True):
                self._bind(term, axis, labels, relation)
        for label, size in relation.sizes.items():
            labels.setdefault(label, Axis.fresh(size))
        where = _where(node)
        for label, why in relation.fixed.items():
            labels[label].forbid(f"{where} {why}" if where else why)
        for label, units in relation.units.items():
            labels[label].coarsen(units)
        self.axes[node] = [
            [self._axis(term, labels) for term in terms] for terms in relation.results
        ]

    def _bind(self, term: Term, axis: Axis, labels: dict[int, Axis], relation: Relation) -> None:
        if not term.labels:
            return
        if len(term.labels) == 1:
            (label,) = term.labels
            if label in labels:
                self._same(labels[label], axis)
            else:
                labels[label] = axis
            return
        for label in term.labels:
            if label not in labels:
                labels[label] = Axis.fresh(relation.sizes[label])
        parts = [labels[label] for label in term.labels]
        if term.kind == "row":
            self._same(_row(parts), axis)
        else:
            self.products.append(Product(axis, parts))

    def _axis(self, term: Term, labels: dict[int, Axis]) -> Axis:
        if not term.labels:
            return Axis.fresh(1)
        parts = [labels[label] for label in term.labels]
        if len(parts) == 1:
            return parts[0]
        if term.kind == "row":
            return _row(parts)
        whole = Axis.fresh(prod(part.size for part in parts))
        self.products.append(Product(whole, parts))
        return whole

    def _same(self, first: Axis, second: Axis) -> None:
        """Unify at once, or, for a number of rows times something, when products are settled."""
        if is_symbolic(first.size):
            self._later.append((first, second))
        else:
            unify(first, second)

    def _settle(self) -> None:
        """Settle what is forced until nothing is; then the first that is not; and on."""
        made = {id(product.whole) for product in self.products}
        parts = [part for product in self.products for part in product.parts]
        values = [axis for node in self.axes for axis in self._all(node)]
        for axis in [*values, *parts]:
            if is_symbolic(axis.size) and id(axis) not in made:
                axis.forbid("it varies with the batch")
        while waiting := [product for product in self.products if not product.settled]:
            settled = [self._try(product) for product in waiting]
            left = [product for product in waiting if not product.settled]
            if left and True not in settled:
                self._decide(*self._preferred(left))
        for first, second in self._later:
            unify(first, second)

    def _preferred(self, waiting: list[Product]) -> tuple[Product, int]:
        """A product that a weight depends on, and its outermost factor on which one does.

        So heads go before the width of a head, and before rows that they are multiplied with.
        """
        weighty = {
            id(atom)
            for node in self.axes
            if node.op == "placeholder" and node.name in self.state
            for axis in self._all(node)
            for atom in axis.atoms()
        }
        before = -1
        while len(weighty) != before:
            before = len(weighty)
            for product in self.products:
                if any(id(atom) in weighty for atom in product.whole.atoms()):
                    weighty.update(id(atom) for part in product.parts for atom in part.atoms())

        def carries(axis: Axis) -> bool:
            return any(id(atom) in weighty for atom in axis.atoms())

        product = next((each for each in waiting if carries(each.whole)), waiting[0])
        candidates = _candidates(product)
        heavy = [at for at in candidates if carries(product.parts[at])]
        return product, (heavy or candidates)[0]

    def _try(self, product: Product) -> bool:
        candidates = _candidates(product)
        why = product.whole.veto
        if why is not None:
            for part in product.parts:
                part.forbid(why)
        elif not candidates:
            product.whole.forbid(
                next(filter(None, (p.veto for p in product.parts)), "its size is 1")
            )
        elif len(candidates) == 1:
            self._decide(product, candidates[0])
            return True
        else:
            return False
        product.settled = True
        return True

    def _decide(self, product: Product, chosen: int) -> None:
        for at, part in enumerate(product.parts):
            if at != chosen and part.size > 1:
                part.forbid("a reshape keeps it whole beside what is cut")
        before = prod(part.size for part in product.parts[:chosen])
        after = prod(part.size for part in product.parts[chosen + 1 :])
        product.settled = True
        result = product.parts[chosen].times(before, after)
        if is_symbolic(product.whole.size):
            # Copies that nobody can write out; what it was joined with is joined later.
            product.whole.outer, product.whole.row = result.outer, result.row
        else:
            unify(product.whole, result)


def _candidates(product: Product) -> list[int]:
    free = [at for at, part in enumerate(product.parts) if part.size > 1 and part.veto is None]
    copies = product.whole.copies()
    if copies == 1:
        return free
    # Another reshape has settled that the cut lies inside of so many copies.
    inside = []
    before = 1
    for at, part in enumerate(product.parts):
        if copies % before == 0 and copies // before < part.size:
            inside.append(at)
        before *= part.size
    return [at for at in free if at in inside]


def _row(parts: list[Axis]) -> Axis:
    if any(is_symbolic(part.size) for part in parts):
        for part in parts:
            part.forbid("a concatenation of copies that vary with the batch")
        return Axis.fresh(sum(part.size for part in parts))
    row: list[tuple[int, Atom]] = []
    for part in parts:
        row += part.expand() * part.outer
    return Axis(1, row)


def _fresh(value: Any) -> Axes:
    return [Axis.fresh(size) for size in shape(value)] if isinstance(value, Tensor) else []


def _tensors(value: Any) -> list[Any]:
    return [value] if isinstance(value, Tensor) else list(value)


def _no_rule(node: Node) -> str:
    return f"{_where(node)} has no rule for being cut".lstrip()


def _where(node: Node) -> str:
    name = overload_name(node)[0]
    path = node.meta.get("path")
    return f"{name} of {path}:" if path else f"{name}:"


def find_classes(analysis: Analysis) -> list[Class]:
    """Classes that hold a dimension of a parameter or buffer, in the order of the placeholders."""
    fates = _fates(analysis)
    classes: dict[int, Class] = {}
    for node, values in analysis.axes.items():
        if node.name not in analysis.state or node.op != "placeholder":
            continue
        for dim, axis in enumerate(values[0]):
            if axis.size > 1:
                fate = fates.find(axis.atoms()[0])
                found = classes.setdefault(fate, Class(len(classes)))
                found.tensors.setdefault(node.name, (dim, axis))
    _judge(analysis, fates, classes)
    return list(classes.values())


class _Fates:
    """Union-find over atoms by identity."""

    def __init__(self) -> None:
        self._above: dict[int, int] = {}
        self.atoms: dict[int, Atom] = {}

    def find(self, atom: Atom) -> int:
        key = id(atom)
        self.atoms[key] = atom
        while key in self._above:
            key = self._above[key]
        return key

    def join(self, first: Atom, second: Atom) -> None:
        one, other = self.find(first), self.find(second)
        if one != other:
            self._above[other] = one


def _fates(analysis: Analysis) -> _Fates:
    fates = _Fates()
    rows = [axis for values in analysis.axes.values() for axes in values for axis in axes]
    for axis in rows:
        atoms = axis.atoms()
        fates.find(atoms[0])
        for atom in atoms[1:]:
            fates.join(atoms[0], atom)
    return fates


def _judge(analysis: Analysis, fates: _Fates, classes: dict[int, Class]) -> None:
    """Vetoes, units and conflicts of the classes."""
    for atom in list(fates.atoms.values()):
        found = classes.get(fates.find(atom))
        if found is not None:
            found.veto = found.veto or atom.veto
            found.units = min(found.units or atom.units, atom.units)
    for node, values in analysis.axes.items():
        for axes in values:
            here: list[int] = []
            for axis in axes:
                fate = fates.find(axis.atoms()[0]) if axis.size > 1 else None
                if fate in classes:
                    here.append(fate)
            _together([classes[fate] for fate in here], node)


def _together(here: list[Class], node: Node) -> None:
    """No tensor is cut along two dimensions."""
    for at, one in enumerate(here):
        for other in here[at + 1 :]:
            if one is other:
                one.veto = one.veto or f"two dimensions of {node.name} would be cut alike"
            else:
                one.conflicts.add(other.number)
                other.conflicts.add(one.number)
