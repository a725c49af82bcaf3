"""A graph rewritten for one rank: cuts are carried from the parameters through every operation.

    whole value ── enter ──┐
                           linear (my rows) ── gelu ── linear (my columns) ── leave ── + bias
    weight, cut ───────────┘

What each operation does with its dimensions comes from its `Relation`. This is where it is decided
that a plan is right: what no rule covers raises `CannotCut`, whatever the plan hoped for.
"""

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import floordiv, getitem, mul
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from shoal.comm import Group
from shoal.parallel.tensor import nodes
from shoal.parallel.tensor.calls import Call, overload_name
from shoal.parallel.tensor.relate import relate
from shoal.parallel.tensor.relation import Local, Operand, Relation, Term
from shoal.parallel.tensor.sizes import hint, is_symbolic, size
from shoal.parallel.tensor.split import Split, in_product, in_row, of_product, of_row

aten = torch.ops.aten


class CannotCut(Exception):
    """Why an operation cannot work on what is cut."""


@dataclass(frozen=True)
class Cut:
    """One value lies on the ranks along `dim` as `split`."""

    dim: int
    split: Split


@dataclass
class Rewriting:
    """One walk over `graph`, which it changes. `group` says which rank this is."""

    graph: Graph
    cuts: dict[str, Cut]
    group: Group
    trained: frozenset[str]
    keep_outputs: bool = True
    dry: bool = False
    state: dict[Node, list[Cut | None]] = field(default_factory=dict)
    moved: int = 0
    cut_outputs: dict[int, Cut] = field(default_factory=dict)
    macs: int = 0
    narrowed: set[str] = field(default_factory=set)
    _relations: dict[Node, Relation] = field(default_factory=dict)
    _moving: set[Node] = field(default_factory=set)
    _whole: dict[Node, Any] = field(default_factory=dict)
    _needs: set[Node] = field(default_factory=set)
    _entered: dict[Node, Node] = field(default_factory=dict)
    _parts: dict[tuple[Node, Cut], Node] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.group.rank

    def run(self) -> None:
        """Rewrite all nodes. Raises `CannotCut`."""
        self._needs = with_gradient(self.graph, self.trained)
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                self._placeholder(node)
            elif any(self._is_cut(each) for each in node.all_input_nodes):
                self._visit(node)

    def try_out(
        self, order: dict[Node, int], needs: set[Node], relations: dict[Node, Relation]
    ) -> None:
        """The same without a change to the graph, of the nodes alone that see a cut.

        ``order`` numbers the nodes, ``needs`` is `with_gradient` of the graph, ``relations`` what
        is known of its nodes. Raises `CannotCut`.
        """
        self.dry, self._needs, self._relations = True, needs, relations
        todo: list[tuple[int, Node]] = []
        seen: set[Node] = set()
        for node in order:
            if node.op != "placeholder":
                break
            self._placeholder(node)
            if node in self.state:
                seen.add(node)
                heapq.heappush(todo, (order[node], node))
        while todo:
            _, node = heapq.heappop(todo)
            if node.op != "placeholder":
                self._visit(node)
            for user in node.users if self._is_cut(node) else ():
                if user not in seen:
                    seen.add(user)
                    heapq.heappush(todo, (order[user], user))

    def _visit(self, node: Node) -> None:
        if node.op == "output":
            self._outputs(node)
        else:
            self._operation(node)

    def _is_cut(self, node: Node) -> bool:
        return any(cut is not None for cut in self.state.get(node, ()))

    def value(self, node: Node) -> Any:
        """The whole (fake) value of a node."""
        return self._whole.get(node, node.meta.get("val"))

    def _placeholder(self, node: Node) -> None:
        cut = self.cuts.get(node.name)
        if cut is not None:
            self._mark(node, [cut])

    def note_moved(self, value: Node) -> None:
        """A collective over all of a value, of which one for each is enough."""
        if value not in self._moving:
            self._moving.add(value)
            self.moved += numel(self.value(value).shape)

    def _collective(self, node: Node, kind: str, *, backward: bool) -> None:
        """``meta["collective"] = (kind, whether it runs in the backward pass)``."""
        node.meta["collective"] = (kind, backward)

    def _mark(self, node: Node, cuts: list[Cut | None]) -> None:
        """Note how a node's results are cut, and give it local fake values."""
        if not any(cut is not None for cut in cuts):
            return
        whole = node.meta["val"]
        self.state[node] = cuts
        if self.dry:
            return
        self._whole[node] = whole
        if isinstance(whole, Tensor):
            node.meta["val"] = nodes.local_value(whole, cuts[0], self.rank)
            nodes.describe(node, cuts[0], self.rank)
        else:
            pairs = zip(whole, cuts, strict=True)
            node.meta["val"] = [nodes.local_value(each, cut, self.rank) for each, cut in pairs]

    def _operation(self, node: Node) -> None:
        if node.target is getitem:
            index = node.args[1]
            assert isinstance(index, int)
            self._mark(node, [self.state[node.args[0]][index]])  # type: ignore[index]
            return
        if not isinstance(node.meta.get("val"), Tensor | list | tuple):
            self._number(node)
            return
        inputs = [each for each in node.all_input_nodes if each in self._whole]
        local = [each.meta["val"] for each in inputs]
        for each in inputs:  # rules look at whole values
            each.meta["val"] = self._whole[each]
        try:
            relation = self._relations.get(node) or relate(node)
            if relation is None:
                raise CannotCut(f"{overload_name(node)[0]} has no rule for being cut")
            _Operation(self, node, relation).rewrite()
        finally:
            for each, value in zip(inputs, local, strict=True):
                each.meta["val"] = value

    def _number(self, node: Node) -> None:
        """A size keeps meaning the whole's."""
        name = overload_name(node)[0]
        source = node.args[0] if node.args else None
        if name != "sym_size" or not isinstance(source, Node):
            raise CannotCut(f"{name} makes a number of what is cut")
        cut = self.state[source][0]
        dim = node.args[1] % len(self.value(source).shape)  # type: ignore[operator]
        if cut is None or cut.dim != dim or self.dry:
            return
        local, row = cut.split.local_row(self.rank), cut.split.row
        if not local:
            raise CannotCut("a size of what this rank has nothing of")
        with self.graph.inserting_after(node):
            copies = self.graph.call_function(floordiv, (node, local))
        copies.meta["val"] = node.meta["val"] // row
        with self.graph.inserting_after(copies):
            total = self.graph.call_function(mul, (copies, row))
        total.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not copies)

    def enter(self, value: Node, before: Node) -> Node:
        """`value` for work of which each rank does a part; one for all users of a value."""
        if value not in self._needs or not self.value(value).dtype.is_floating_point:
            return value
        if self.dry:
            self.note_moved(value)
            return value
        if value not in self._entered:
            with self.graph.inserting_before(before):
                made = nodes.collective(self.graph, "enter", value, self.group)
            nodes.inherit(made, before, self.value(value))
            self._needs.add(made)
            self._entered[value] = made
            self._collective(made, "all_reduce", backward=True)
        return self._entered[value]

    def part(self, value: Node, cut: Cut, before: Node) -> Node:
        """This rank's part of a whole value."""
        key = (value, cut)
        if value.op == "placeholder":
            self.narrowed.add(value.name)
        if self.dry:
            return self.enter(value, before)
        if key not in self._parts:
            entered = self.enter(value, before)
            with self.graph.inserting_before(before):
                made = nodes.take_part(self.graph, entered, cut, self.rank)
            nodes.inherit(made, before, nodes.local_value(self.value(value), cut, self.rank))
            if value in self._needs:
                self._needs.add(made)
            self._parts[key] = made
        return self._parts[key]

    def leave(self, value: Node, path_of: Node) -> Node:
        """The sum over ranks of a node's partial sums; takes its place everywhere."""
        with self.graph.inserting_after(value):
            made = nodes.collective(self.graph, "leave", value, self.group)
        nodes.inherit(made, path_of, value.meta["val"])
        if value in self._needs:
            self._needs.add(made)
        self._collective(made, "all_reduce", backward=False)
        return made

    def _outputs(self, node: Node) -> None:
        results: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        for at, value in enumerate(results):
            cut = self.state.get(value, [None])[0] if isinstance(value, Node) else None
            if cut is None:
                continue
            if self.keep_outputs and is_logits(self.value(value), cut):
                self.cut_outputs[at] = cut
                continue
            lengths = [cut.split.local(rank) for rank in range(self.group.size)]
            if cut.split.outer != 1 or len(cut.split.blocks) != 1:
                raise CannotCut("an output of the model is cut into several pieces")
            if self.dry:
                self.note_moved(value)
                continue
            with self.graph.inserting_before(node):
                made = nodes.collective(self.graph, "gather", value, self.group, cut.dim, lengths)
            nodes.inherit(made, value, self.value(value))
            made.meta["longest"] = (cut.dim, max(lengths))
            results[at] = made
            self._collective(made, "all_gather", backward=False)
        if not self.dry:
            node.args = (tuple(results),)


def with_gradient(graph: Graph, trained: frozenset[str]) -> set[Node]:
    """The nodes that a gradient may pass through: all that come from a trained parameter."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.name in trained or any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def numel(sizes: Iterable[Any]) -> int:
    """The number of elements at the traced sizes."""
    return math.prod(hint(number) for number in sizes)


def is_logits(value: Tensor, cut: Cut) -> bool:
    """Whether an output may stay cut: scores [n, …, classes], each rank with a range of classes."""
    last = value.dim() >= 2 and cut.dim == value.dim() - 1
    one = cut.split.outer == 1 and len(cut.split.blocks) == 1
    return last and one and value.dtype.is_floating_point


class _Operation:
    """One operation of which an operand is cut."""

    def __init__(self, walk: Rewriting, node: Node, relation: Relation) -> None:
        self.walk, self.node, self.relation = walk, node, relation
        self.call = Call(node)
        self.labels: dict[int, Split] = {}

    def rewrite(self) -> None:
        """Raises `CannotCut`."""
        for operand in self.relation.operands:
            cut = self._cut_of(operand)
            if cut is not None:
                self._solve(operand.terms[cut.dim], cut.split)
        self._check_labels()
        summed = [label for label in self.labels if label in self.relation.sums]
        if summed and len(self.labels) > 1:
            raise CannotCut("it would be cut along two dimensions")
        results = [self._cut(terms) for terms in self.relation.results]
        changes = self._operands(bool(summed))
        self.walk.macs += self._macs()
        if self.walk.dry:
            self._note(bool(summed), results)
        elif summed and self.relation.special == "embedding":
            self._look_up(changes)
        elif summed:
            self._sum(changes)
        else:
            self._adjust(changes, results)
            self._replace(changes)
            self.walk._mark(self.node, results)

    def _note(self, summed: bool, results: list[Cut | None]) -> None:
        if summed:
            self._check_sum()
            self.walk.moved += numel(self.call.value.shape)
        else:
            self.walk.state[self.node] = results

    def _check_sum(self) -> None:
        added = self.call.get(self.relation.added) if self.relation.added else None
        if isinstance(added, Node) and self.walk._is_cut(added):
            raise CannotCut("the bias of a sum over what is cut is cut as well")
        if self.relation.special == "embedding":
            weight = self.walk.state.get(self.call["weight"], [None])[0]
            if weight is None or weight.split.outer != 1 or len(weight.split.blocks) != 1:
                raise CannotCut("a vocabulary in several pieces")

    def _macs(self) -> int:
        macs = self.relation.macs
        value = self.call.value
        if macs and isinstance(value, Tensor):
            for number in value.shape:
                macs *= hint(number)
        return macs

    def _cut_of(self, operand: Operand) -> Cut | None:
        return self.walk.state.get(operand.node, [None])[0]

    def _solve(self, term: Term, split: Split) -> None:
        """How the labels of one dimension are cut."""
        sizes = [self.relation.sizes[label] for label in term.labels]
        found: list[tuple[int, Split]] = []
        if term.kind == "row":
            pieces = in_row(split, sizes)
            if pieces is not None:
                found = list(zip(term.labels, pieces, strict=True))
        elif len(sizes) == 1:
            resized = split.resized(sizes[0])
            found = [(term.labels[0], resized)] if resized is not None else []
        else:
            factor = in_product(split, sizes)
            if factor is not None:
                found = [(term.labels[factor[0]], factor[1])]
        if not found:
            raise CannotCut("the parts do not fall on whole elements of the new shape")
        for label, mine in found:
            if self.labels.setdefault(label, mine) != mine:
                raise CannotCut("its operands are cut differently")

    def _check_labels(self) -> None:
        used = self.relation.sums | self.relation.dropped
        for terms in self.relation.results:
            used = used.union(*(term.labels for term in terms))
        for label, split in self.labels.items():
            if label not in used:
                raise CannotCut(f"{overload_name(self.node)[0]} has no rule for being cut")
            why = self.relation.fixed.get(label)
            if why is not None:
                raise CannotCut(f"{overload_name(self.node)[0]}: {why}")
            units = self.relation.units.get(label)
            if units is not None and split.resized(units) is None:
                raise CannotCut("the parts do not fall between its groups")

    def _cut(self, terms: tuple[Term, ...]) -> Cut | None:
        """How a value of these dimensions is cut."""
        found: list[Cut] = []
        for dim, term in enumerate(terms):
            cut = [label for label in term.labels if label in self.labels]
            if not cut:
                continue
            found.append(Cut(dim, self._dimension(term, cut)))
        if len(found) > 1:
            raise CannotCut("it would be cut along two dimensions")
        return found[0] if found else None

    def _dimension(self, term: Term, cut: list[int]) -> Split:
        sizes = [self.relation.sizes[label] for label in term.labels]
        split: Split | None = None
        if term.kind == "row":
            if len(cut) == len(term.labels):
                split = of_row([self.labels[label] for label in term.labels])
        elif len(cut) == 1:
            split = of_product(self.labels[cut[0]], term.labels.index(cut[0]), sizes)
        if split is None:
            raise CannotCut("parts that are cut are joined with parts that are whole")
        return split

    def _operands(self, summed: bool) -> list[tuple[Operand, Node]]:
        """What each operand becomes: itself, its part, or its whole entering."""
        changes = []
        for operand in self.relation.operands:
            if summed and operand.name == self.relation.added:
                continue
            here = self._cut_of(operand)
            wanted = self._wanted(operand)
            if here is not None:
                if here != wanted:
                    raise CannotCut("an operand is cut in another way than the others")
                continue
            if wanted is not None:
                new = self._taken(operand, wanted)
            elif summed and self.relation.special == "embedding":
                continue
            elif summed:
                raise CannotCut("a sum over what is cut has an operand that is not")
            else:
                new = self.walk.enter(operand.node, self.node)
            if wanted is not None or new is not operand.node:
                self._may_change(operand)
                changes.append((operand, new))
        return changes

    def _wanted(self, operand: Operand) -> Cut | None:
        cut = self._cut(operand.terms)
        if cut is None:
            return None
        whole = size(self.walk.value(operand.node).shape[cut.dim])
        split = cut.split.resized(whole)
        if split is None:
            raise CannotCut("the parts do not fall on whole elements of an operand")
        return Cut(cut.dim, split)

    def _taken(self, operand: Operand, wanted: Cut) -> Node:
        return self.walk.part(operand.node, wanted, self.node)

    def _may_change(self, operand: Operand) -> None:
        schema = getattr(self.node.target, "_schema", None)
        if operand.name in self.relation.kept or (schema is not None and schema.is_mutable):
            raise CannotCut("it writes to a value that is whole")

    def _replace(self, changes: list[tuple[Operand, Node]]) -> None:
        for operand, new in changes:
            if operand.index is None:
                self.call.arguments[operand.name] = new
            else:
                listed = list(self.call.arguments[operand.name])
                listed[operand.index] = new
                self.call.arguments[operand.name] = listed
        nodes.set_arguments(self.node, self.call.arguments)

    def _adjust(self, changes: list[tuple[Operand, Node]], results: list[Cut | None]) -> None:
        if self.relation.adjust is None:
            return
        values = self.call.results()
        sizes: list[list[int | None]] = []
        for value, cut in zip(values, results, strict=True):
            mine: list[int | None] = [None] * value.dim()
            if cut is not None:
                mine[cut.dim] = cut.split.local(self.walk.rank)
            sizes.append(mine)

        def scaled(argument: Any, result: int, dim: int) -> Any:
            cut = results[result]
            assert cut is not None
            local, row = cut.split.local_row(self.walk.rank), cut.split.row
            if isinstance(argument, int):
                symbolic = is_symbolic(size(values[result].shape[dim]))
                if argument == -1:
                    # Torch cannot infer a size beside one of 0.
                    return -1 if local or symbolic else 0
                return argument // row * local
            return self._scaled_node(argument, row, local)

        here = {label: split.local(self.walk.rank) for label, split in self.labels.items()}
        local = Local(here, self.relation.sizes, self.relation.units, sizes, scaled)
        self.relation.adjust(self.call.arguments, local)

    def _scaled_node(self, number: Node, row: int, local: int) -> Node:
        graph = self.walk.graph
        with graph.inserting_before(self.node):
            copies = graph.call_function(floordiv, (number, row))
            made = graph.call_function(mul, (copies, local))
        copies.meta["val"] = number.meta["val"] // row
        made.meta["val"] = copies.meta["val"] * local
        return made

    def _sum(self, changes: list[tuple[Operand, Node]]) -> None:
        """Partial sums, then their sum, then what is added to it once."""
        self._check_sum()
        added = self.relation.added
        bias = self.call.get(added) if added else None
        if added is not None and bias is not None:
            if added == "self":  # addmm, baddbmm
                self.call.arguments.pop("self")
                for name in ("alpha", "beta"):
                    self.call.arguments.pop(name, None)
                self.call.arguments["target"] = "mm" if self.call.name == "addmm" else "bmm"
            else:
                self.call.arguments[added] = None
        self._replace(changes)
        if self.relation.special == "mean":
            nodes.mean_part(self.node, self.call, self.relation.mean_over)
        last = self.walk.leave(self.node, self.node)
        users = [last]
        if isinstance(bias, Node):
            last = self._add(last, bias, users)
        self.node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in users)

    def _add(self, last: Node, bias: Node, users: list[Node]) -> Node:
        """The bias, in the shape that it broadcasts from."""
        position = last
        if self.relation.added == "bias" and self.call.name != "linear":
            value = self.call.value
            at = 1 if value.dim() == len(self.call.shape("weight")) else 0
            ones = [1] * (value.dim() - at - 1)
            position = bias = self._after(last, aten.reshape.default, (bias, [-1, *ones]))
        last = self._after(position, nodes.add_bias, (last, bias))
        users.append(last)
        return last

    def _after(self, after: Node, target: Any, arguments: tuple[Any, ...]) -> Node:
        graph = self.walk.graph
        with graph.inserting_after(after):
            made = graph.call_function(target, arguments)
        source = arguments[0].meta["val"]
        value = self.call.value
        if target is aten.reshape.default:
            value = nodes.computed(target, source, arguments[1])
        nodes.inherit(made, self.node, value)
        if any(each in self.walk._needs for each in made.all_input_nodes):
            self.walk._needs.add(made)
        return made

    def _look_up(self, changes: list[tuple[Operand, Node]]) -> None:
        """Words of this rank's range are looked up; others count nothing."""
        self._check_sum()
        weight = self.walk.state[self.call["weight"]][0]
        assert weight is not None
        bounds = weight.split.blocks[0].bounds
        first, last = bounds[self.walk.rank], bounds[self.walk.rank + 1]
        padding = self.call.get("padding_idx", -1)
        nodes.look_up(self.node, self.call, first, last, padding)
        made = self.walk.leave(self.node, self.node)
        self.node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
