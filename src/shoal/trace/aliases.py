"""Which values of a graph share memory, and which of them are written to.

    y = view(x)            {x, y} share
    z = relu_(y)           {x, y, z} share, and are written to at z

    shared = Sharing.of(graph)
    shared.root(node), shared.written

Known by the operators' schemas, and by the storages of the fake tensors of the trace (`dropout` in
eval mode gives its input back and does not say so), which `note_memory` numbers in meta["memory"].
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node


@dataclass
class Sharing:
    """Groups of nodes that share memory, by one node that stands for each group."""

    _parents: dict[Node, Node] = field(default_factory=dict)
    writes: dict[Node, list[Node]] = field(default_factory=dict)  # by the node written to

    @staticmethod
    def of(graph: Graph) -> "Sharing":
        """The groups of a whole graph."""
        sharing = Sharing()
        storages: dict[int, Node] = {}
        for node in graph.nodes:
            if node.op == "output":
                continue
            for other in shares_with(node):
                sharing.join(other, node)
            for key in node.meta.get("memory", ()):
                sharing.join(storages.setdefault(key, node), node)
            for target in written_by(node):
                sharing.writes.setdefault(target, []).append(node)
        return sharing

    def root(self, node: Node) -> Node:
        """The node that stands for the group of ``node``."""
        while (parent := self._parents.get(node, node)) is not node:
            node = parent
        return node

    def join(self, one: Node, other: Node) -> None:
        """Put two nodes' groups together."""
        one, other = self.root(one), self.root(other)
        if one is not other:
            self._parents[other] = one

    @property
    def written(self) -> set[Node]:
        """The roots of the groups that are written to."""
        return {self.root(node) for node in self.writes}

    def groups(self, graph: Graph) -> dict[Node, list[Node]]:
        """The nodes of each group, in the graph's order."""
        found: dict[Node, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            if node.op != "output":
                found[self.root(node)].append(node)
        return found


def written_by(node: Node) -> list[Node]:
    """The nodes whose memory this one's operator writes to; batch norm's statistics among them."""
    if not isinstance(node.target, OpOverload):
        return []
    return [found for argument, found in _arguments(node) if _is_written(argument)] + _statistics(
        node
    )


def shares_with(node: Node) -> list[Node]:
    """The nodes whose memory this one's result may lie in."""
    if node.op != "call_function":
        return []
    if is_getitem(node):
        return [node.args[0]] if isinstance(node.args[0], Node) else []
    if not isinstance(node.target, OpOverload):
        return []
    if not any(result.alias_info is not None for result in node.target._schema.returns):
        return []
    return [found for argument, found in _arguments(node) if argument.alias_info is not None]


def is_getitem(node: Node) -> bool:
    """Whether a node takes one value of a node that has several."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def _arguments(node: Node) -> list[tuple[Any, Node]]:
    """(argument of the schema, node given for it), lists looked into."""
    assert isinstance(node.target, OpOverload)
    found = []
    for index, argument in enumerate(node.target._schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        items = given if isinstance(given, list | tuple) else [given]
        found += [(argument, item) for item in items if isinstance(item, Node)]
    return found


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _statistics(node: Node) -> list[Node]:
    """Running statistics that a normalisation updates: its schema does not say so."""
    assert isinstance(node.target, OpOverload)
    if node.target._overloadpacket not in (
        torch.ops.aten.batch_norm,
        torch.ops.aten.instance_norm,
    ):
        return []
    return [given for given in node.args[3:5] if isinstance(given, Node) and node.args[5]]


def note_memory(graph: Graph) -> None:
    """Number the memory of every traced value, in ``meta["memory"]``."""
    for node in graph.nodes:
        node.meta["memory"] = tuple(_storages(node.meta.get("val")))


def own_memory(nodes: list[Node]) -> None:
    """These nodes share memory with each other and no longer with any other."""
    number = -next(_numbers)  # a storage's number is positive
    for node in nodes:
        node.meta["memory"] = (number,)


_numbers = itertools.count(1)


def _storages(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)]
