"""Batch norm in a traced graph: nodes that call the module's own layer, over `BatchGroups`.

batch_norm(x, weight, bias, mean, variance, True, …)   →   layer.normalise(x, weight, bias, call)
num_batches_tracked.add_(1)                            →   the layer's own business

use_group_norms(traced, model, groups)
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from shoal.errors import Refused
from shoal.parallel.batch_groups import BatchGroups
from shoal.parallel.statistics import GroupBatchNorm, use_groups
from shoal.trace.aliases import Sharing, written_by

aten = torch.ops.aten


class HasGraph(Protocol):
    """A traced graph, as far as it is needed here."""

    graph: Graph
    state: dict[str, str]


@dataclass(frozen=True)
class _Call:
    """One call of a layer; the running statistics are arguments so that they stay beside it."""

    layer: GroupBatchNorm
    number: int

    __name__ = "normalise"

    def __call__(
        self, input: Tensor, weight: Any, bias: Any, _mean: Any = None, _variance: Any = None
    ) -> Tensor:
        return self.layer.normalise(input, weight, bias, self.number)


def batch_norms(traced: HasGraph) -> list[Node]:
    """The nodes that normalise by the statistics of the batch."""
    return [
        node
        for node in traced.graph.nodes
        if node.op == "call_function" and node.target is aten.batch_norm.default and node.args[5]
    ]


def use_group_norms(traced: HasGraph, model: nn.Module, groups: BatchGroups) -> int:
    """Replace every batch norm in training mode by its module's layer; how many there were.

    Raises `Refused` for one that is no layer of the model.
    """
    found = batch_norms(traced)
    if not found:
        return 0
    use_groups(model, groups)
    layers = dict(model.named_modules(remove_duplicate=False))
    for node in found:
        path = str(node.meta.get("path", ""))
        layer = layers.get(path)
        if not isinstance(layer, GroupBatchNorm):
            raise Refused(
                f"a batch norm that is no layer of the model, at {node.meta.get('line') or path}, "
                "has statistics that several ranks or microbatches cannot share",
                hint="Use torch.nn.BatchNorm1d, 2d or 3d.",
            )
        node.target, node.args = _Call(layer, int(node.meta.get("call", 0))), node.args[:5]
    _drop_counters(traced)
    return len(found)


def _drop_counters(traced: HasGraph) -> None:
    counters = {n for n, path in traced.state.items() if path.endswith("num_batches_tracked")}
    counts: list[Node] = []
    for node in traced.graph.nodes:
        if node.op != "call_function" or node.target is not aten.add_.Tensor:
            continue
        # Of a layer that is called twice, the second counts on from the first.
        if getattr(node.args[0], "name", None) in counters or node.args[0] in counts:
            counts.append(node)
    for node in reversed(counts):
        if not node.users:
            traced.graph.erase_node(node)


def refuse_written_buffers(traced: HasGraph) -> None:
    """Raise `Refused` if the forward pass changes a buffer: each microbatch would.

    By whatever name: what is written to without gradient is a detached view of it.
    """
    sharing = Sharing.of(traced.graph)
    held = {sharing.root(node): traced.state[node.name] for node in traced.graph.nodes
            if node.name in traced.state}  # fmt: skip
    for node in traced.graph.nodes:
        for written in written_by(node) if node.op == "call_function" else ():
            name = held.get(sharing.root(written))
            if name is not None:
                raise Refused(
                    f"the forward pass changes the buffer {name} (at "
                    f"{node.meta.get('line')}), and several microbatches would change it as often",
                    hint="Use mb:1, or a strategy without pp.",
                )
