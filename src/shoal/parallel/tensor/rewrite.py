"""A graph rewritten for one rank: cuts are carried from the parameters through every operation.

    whole value ── enter ──┐
                           linear (my rows) ── gelu ── linear (my columns) ── leave ── + bias
    weight, cut ───────────┘

What each operation does with its dimensions comes from its `Relation`. This is where it is decided
that a plan is right: what no rule covers raises `CannotCut`, whatever the plan hoped for.
"""

import heapq
from dataclasses import dataclass, field
from operator import floordiv, getitem, mul
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from shoal.comm import Group
from shoal.parallel.tensor import nodes
from shoal.parallel.tensor.calls import overload_name
from shoal.parallel.tensor.operation import Operation
from shoal.parallel.tensor.relate import relate
from shoal.parallel.tensor.relation import Relation
from shoal.parallel.tensor.sizes import numel
from shoal.parallel.tensor.split import CannotCut, Cut


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
    needs: set[Node] = field(default_factory=set)
    _entered: dict[Node, Node] = field(default_factory=dict)
    _parts: dict[tuple[Node, Cut], Node] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        return self.group.rank

    def run(self) -> None:
        """Rewrite all nodes. Raises `CannotCut`."""
        self.needs = with_gradient(self.graph, self.trained)
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                self._placeholder(node)
            elif any(self.is_cut(each) for each in node.all_input_nodes):
                self._visit(node)

    def try_out(
        self, order: dict[Node, int], needs: set[Node], relations: dict[Node, Relation]
    ) -> None:
        """The same without a change to the graph, of the nodes alone that see a cut.

        ``order`` numbers the nodes, ``needs`` is `with_gradient` of the graph, ``relations`` what
        is known of its nodes. Raises `CannotCut`.
        """
        self.dry, self.needs, self._relations = True, needs, relations
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
            for user in node.users if self.is_cut(node) else ():
                if user not in seen:
                    seen.add(user)
                    heapq.heappush(todo, (order[user], user))

    def _visit(self, node: Node) -> None:
        if node.op == "output":
            self._outputs(node)
        else:
            self._operation(node)

    def is_cut(self, node: Node) -> bool:
        return any(cut is not None for cut in self.state.get(node, ()))

    def value(self, node: Node) -> Any:
        """The whole (fake) value of a node."""
        return self._whole.get(node, node.meta.get("val"))

    def _placeholder(self, node: Node) -> None:
        cut = self.cuts.get(node.name)
        if cut is not None:
            self.mark(node, [cut])

    def note_moved(self, value: Node) -> None:
        """A collective over all of a value, of which one for each is enough."""
        if value not in self._moving:
            self._moving.add(value)
            self.moved += numel(self.value(value).shape)

    def _collective(self, node: Node, kind: str, *, backward: bool) -> None:
        """``meta["collective"] = (kind, whether it runs in the backward pass)``."""
        node.meta["collective"] = (kind, backward)

    def mark(self, node: Node, cuts: list[Cut | None]) -> None:
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
            self.mark(node, [self.state[node.args[0]][index]])  # type: ignore[index]
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
            Operation(self, node, relation).rewrite()
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
        if value not in self.needs or not self.value(value).dtype.is_floating_point:
            return value
        if self.dry:
            self.note_moved(value)
            return value
        if value not in self._entered:
            with self.graph.inserting_before(before):
                made = nodes.collective(self.graph, "enter", value, self.group)
            nodes.inherit(made, before, self.value(value))
            self.needs.add(made)
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
            if value in self.needs:
                self.needs.add(made)
            self._parts[key] = made
        return self._parts[key]

    def leave(self, value: Node, path_of: Node) -> Node:
        """The sum over ranks of a node's partial sums; takes its place everywhere."""
        with self.graph.inserting_after(value):
            made = nodes.collective(self.graph, "leave", value, self.group)
        nodes.inherit(made, path_of, value.meta["val"])
        if value in self.needs:
            self.needs.add(made)
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


def is_logits(value: Tensor, cut: Cut) -> bool:
    """Whether an output may stay cut: scores [n, …, classes], each rank with a range of classes."""
    last = value.dim() >= 2 and cut.dim == value.dim() - 1
    one = cut.split.outer == 1 and len(cut.split.blocks) == 1
    return last and one and value.dtype.is_floating_point
