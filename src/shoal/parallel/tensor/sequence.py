"""Sequence parallelism: between cut layers, values are kept as parts along the sequence.

    … linear ── leave ──── + x ── norm ──── enter ── linear …         all of it on every rank
    … linear ── scatter_sum ─ + my x ── norm ── collect ── linear …   a part on each

    lines = cut_sequences(traced, model, group)       # after `apply`, in place

A part begins where partial sums are added up, and at embeddings; it goes on through operations that
work element by element or row by row, and is collected for every other. Parameters that these use
whole (a norm's weight) `enter` them, which sums their gradients over the group.
Source: Korthikanti et al. 2022, arXiv 2205.05198.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from shoal.comm import Group
from shoal.comm.differentiable import gather
from shoal.comm.sequences import collect, scatter, scatter_sum
from shoal.parallel.tensor import nodes
from shoal.parallel.tensor.calls import Call, overload_name
from shoal.parallel.tensor.plan import Graphed, trained_placeholders
from shoal.parallel.tensor.rewrite import with_gradient
from shoal.parallel.tensor.split import even_bounds

NOTHING = "sp: nothing lies between cut layers that works row by row: all is as without sp"

_POINTWISE = frozenset({
    "add", "sub", "rsub", "mul", "div", "neg", "abs", "exp", "log", "pow", "square", "sqrt",
    "rsqrt", "reciprocal", "gelu", "relu", "silu", "tanh", "sigmoid", "leaky_relu", "elu",
    "hardtanh", "clamp", "where", "masked_fill", "dropout", "to", "_to_copy",
    "type_as", "clone", "contiguous", "detach", "alias", "float", "add_bias",
})  # fmt: skip

Way = tuple[int, int]  # the dimension that is cut, its whole size


def cut_sequences(traced: Graphed, model: nn.Module, group: Group) -> tuple[str, ...]:
    """Rewrite the graph of this rank; what was done, in words.

    Where nothing can be kept in parts the graph stays as it is.
    """
    if group.size == 1:
        return (NOTHING,)
    needs = with_gradient(traced.graph, trained_placeholders(traced, model))
    found = _find(traced.graph, group.size)
    if not found:
        return (NOTHING,)
    _Parting(traced.graph, found, group, needs).run()
    traced.graph.lint()
    sizes = sorted({size for _, size in found.values()})
    norms = sum(overload_name(node)[0] in ("layer_norm", "rms_norm") for node in found)
    return (
        f"sp: {len(found)} values ({norms} norms) of sequences of "
        f"{', '.join(map(str, sizes))} lie in parts on {group.size} ranks",
    )


def _find(graph: Graph, ranks: int) -> dict[Node, Way]:
    """The values that can be in parts, and how."""
    if any(_writes(node) for node in graph.nodes):
        return {}
    found: dict[Node, Way] = {}
    of: dict[Node, Node] = {}  # union-find: which values hang together

    def root(node: Node) -> Node:
        while of[node] is not node:
            node = of[node]
        return node

    for node in graph.nodes:
        if node.op != "call_function":
            continue
        way = _begins(node, ranks) or _goes_on(node, found)
        if way is None:
            continue
        found[node] = way
        of[node] = node
        for each in node.all_input_nodes:
            if each in found:
                of[root(each)] = root(node)
    sums = {root(node) for node in found if _is(node, "tensor_leave")}
    works = {root(node) for node in found if not _is_start(node)}
    return {node: way for node, way in found.items() if root(node) in sums & works}


def _writes(node: Node) -> bool:
    """Whether it changes a value that is neither a parameter nor a buffer."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return False
    return any(
        each.op != "placeholder" and each.meta["val"].is_floating_point()
        for each in node.all_input_nodes
        if isinstance(each.meta.get("val"), Tensor)
    )


def _is(node: Node, name: str) -> bool:
    return getattr(node.target, "__name__", "") == name


def _is_start(node: Node) -> bool:
    return _is(node, "tensor_leave") or overload_name(node)[0] == "embedding"


def _begins(node: Node, ranks: int) -> Way | None:
    """A whole value [batch, sequence, channels], or [sequence, batch, channels]."""
    value = node.meta.get("val")
    if not _is_start(node) or not isinstance(value, Tensor) or "split" in node.meta:
        return None
    if value.dim() != 3 or not value.dtype.is_floating_point:
        return None
    if any("split" in each.meta for each in node.all_input_nodes) and not _is(node, "tensor_leave"):
        return None
    if any(_is(user, "tensor_leave") for user in node.users):
        return None  # partial sums
    fixed = [dim for dim in (1, 0) if isinstance(value.shape[dim], int)]
    way = (fixed[0], int(value.shape[fixed[0]])) if fixed else None
    return way if way is not None and way[1] >= ranks else None


def _goes_on(node: Node, found: dict[Node, Way]) -> Way | None:
    """How the result of an operation on parts is cut; None where it wants whole values."""
    value = node.meta.get("val")
    ways = {found[each] for each in node.all_input_nodes if each in found}
    if len(ways) != 1 or not isinstance(value, Tensor) or "split" in node.meta:
        return None
    (way,) = ways
    dim, size = way
    if value.dim() != 3 or value.shape[dim] != size or not _row_by_row(node, dim):
        return None
    for each in node.all_input_nodes:
        given = each.meta.get("val")
        if not isinstance(given, Tensor) or "split" in each.meta:
            return None
        if each in found and given.dim() != value.dim():
            return None
        at = dim - (value.dim() - given.dim())
        if at >= 0 and not (isinstance(given.shape[at], int) and given.shape[at] in (1, size)):
            return None
    return way


def _row_by_row(node: Node, dim: int) -> bool:
    name = overload_name(node)[0]
    if name in _POINTWISE:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    call = Call(node)
    if name in ("layer_norm", "rms_norm"):
        return bool(call["input"].meta["val"].dim() - len(call["normalized_shape"]) > dim)
    if name == "mean" and call.get("dim") is not None and call.get("keepdim"):
        rank = call["self"].meta["val"].dim()
        return all(each % rank > dim for each in call["dim"])
    return False


def _collective(
    how: Callable[..., Tensor], name: str, way: tuple[int, list[int]], group: Group
) -> Callable[[Tensor], Tensor]:
    def call(value: Tensor) -> Tensor:
        return how(value, *way, group)

    call.__name__ = call.__qualname__ = name
    return call


class _Parting:
    """One walk over `graph`, which it changes: `found` become parts."""

    def __init__(
        self, graph: Graph, found: dict[Node, Way], group: Group, needs: set[Node]
    ) -> None:
        self.graph, self.found, self.group, self.needs = graph, found, group, needs
        self._whole = {node: node.meta["val"] for node in found}
        self._parts: dict[tuple[Node, int], Node] = {}
        self._entered: dict[Node, Node] = {}

    def run(self) -> None:
        for node in self.found:
            if _is(node, "tensor_leave"):
                self._sum(node)
            elif not _is_start(node):
                self._work(node)
        for node in self.found:
            if node not in self._embeddings():
                self._users(node)

    def _embeddings(self) -> set[Node]:
        """They are whole, and parts are taken of them."""
        return {n for n in self.found if _is_start(n) and not _is(n, "tensor_scatter_sum")}

    def _lengths(self, size: int) -> list[int]:
        bounds = even_bounds(size, self.group.size, size)
        return [last - first for first, last in pairwise(bounds)]

    def _target(self, how: Callable[..., Tensor], name: str, way: Way) -> Any:
        return _collective(how, name, (way[0], self._lengths(way[1])), self.group)

    def _moves(self, node: Node, value: Tensor, way: Way, forward: str, backward: str) -> None:
        """What it sends, for counting: (kind, whether in the backward pass, sizes, bytes each)."""
        node.meta.pop("collective", None)
        longest = max(self._lengths(way[1]))
        of = {"all_gather": longest, "reduce_scatter": longest * self.group.size}
        node.meta["moves"] = [
            (kind, late, [of[kind] if dim == way[0] else n for dim, n in enumerate(value.shape)])
            for kind, late in ((forward, False), (backward, True))
            if kind and not (late and node not in self.needs)
        ]

    def _local(self, node: Node, way: Way) -> None:
        """Describe the part of this rank."""
        lengths = self._lengths(way[1])
        whole, rank = node.meta["val"], self.group.rank
        sizes: list[Any] = list(whole.shape)
        sizes[way[0]] = lengths[rank]
        node.meta["val"] = whole.new_empty(sizes)
        node.meta["cut"] = (way[0], sum(lengths[:rank]), way[1])

    def _sum(self, node: Node) -> None:
        way = self.found[node]
        node.target = self._target(scatter_sum, "tensor_scatter_sum", way)
        self._moves(node, node.meta["val"], way, "reduce_scatter", "all_gather")
        self._local(node, way)

    def _work(self, node: Node) -> None:
        dim, size = self.found[node]
        rank = self._whole[node].dim()
        for each in list(node.all_input_nodes):
            value = self._whole.get(each, each.meta["val"])
            at = dim - (rank - value.dim())
            if each in self.found and each not in self._embeddings():
                continue
            if at >= 0 and value.shape[at] == size and size != 1:
                node.replace_input_with(each, self._part(each, (at, size), node))
            elif each in self.needs:
                node.replace_input_with(each, self._enter(each, node))
        self._local(node, self.found[node])

    def _part(self, whole: Node, way: Way, before: Node) -> Node:
        if (whole, way[0]) not in self._parts:
            made = self._made(whole, self._target(scatter, "tensor_scatter", way), before)
            if whole in self.needs:
                self.needs.add(made)
            self._moves(made, whole.meta["val"], way, "", "all_gather")
            self._local(made, way)
            self._parts[whole, way[0]] = made
        return self._parts[whole, way[0]]

    def _enter(self, whole: Node, before: Node) -> Node:
        if whole not in self._entered:
            with self.graph.inserting_before(before):
                made = nodes.collective(self.graph, "enter", whole, self.group)
            nodes.inherit(made, before, whole.meta["val"])
            made.meta["collective"] = ("all_reduce", True)
            self.needs.add(made)
            self._entered[whole] = made
        return self._entered[whole]

    def _made(self, whole: Node, target: Any, before: Node) -> Node:
        with self.graph.inserting_before(before):
            made = self.graph.call_function(target, (whole,))
        nodes.inherit(made, before, whole.meta["val"])
        return made

    def _users(self, node: Node) -> None:
        """Whoever needs a part's whole value gets it."""
        way, whole = self.found[node], self._whole[node]
        others = [user for user in self._outside(node, way[0]) if not _is(user, "tensor_enter")]
        for user in self._outside(node, way[0]):
            if _is(user, "tensor_enter"):
                user.target = self._target(collect, "tensor_collect", way)
                self._moves(user, whole, way, "all_gather", "reduce_scatter")
        if not others:
            return
        with self.graph.inserting_after(node):
            made = self.graph.call_function(self._target(gather, "tensor_gather", way), (node,))
        nodes.inherit(made, node, whole)
        self._moves(made, whole, way, "all_gather", "")
        for user in others:
            user.replace_input_with(node, made)

    def _outside(self, node: Node, dim: int) -> Iterator[Node]:
        for user in list(node.users):
            if user in self.found:
                continue
            size_of = overload_name(user)[0] == "sym_size" and len(user.args) > 1
            if size_of and int(user.args[1]) % 3 != dim:  # type: ignore[arg-type]
                continue
            yield user
