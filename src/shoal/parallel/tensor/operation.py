"""One operation of which an operand is cut: what becomes of it on this rank.

labels of the cut operands  →  are they allowed?  →  parts of the others  →  results, or a sum

Operation(walk, node, relation).rewrite()             # raises CannotCut
"""

from operator import floordiv, mul
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from shoal.parallel.tensor import nodes
from shoal.parallel.tensor.calls import Call, overload_name
from shoal.parallel.tensor.relation import Local, Operand, Relation, Term
from shoal.parallel.tensor.sizes import hint, is_symbolic, numel, size
from shoal.parallel.tensor.split import (
    CannotCut,
    Cut,
    Split,
    in_product,
    in_row,
    of_product,
    of_row,
)

if TYPE_CHECKING:
    from shoal.parallel.tensor.rewrite import Rewriting

aten = torch.ops.aten


class Operation:
    """One operation of which an operand is cut."""

    def __init__(self, walk: "Rewriting", node: Node, relation: Relation) -> None:
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
            self.walk.mark(self.node, results)

    def _note(self, summed: bool, results: list[Cut | None]) -> None:
        if summed:
            self._check_sum()
            self.walk.moved += numel(self.call.value.shape)
        else:
            self.walk.state[self.node] = results

    def _check_sum(self) -> None:
        added = self.call.get(self.relation.added) if self.relation.added else None
        if isinstance(added, Node) and self.walk.is_cut(added):
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
        if any(each in self.walk.needs for each in made.all_input_nodes):
            self.walk.needs.add(made)
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
