"""Nodes that the rewriting puts into a graph: collectives, parts of whole values, look-ups.

    made = collective(graph, "enter", value, group)

Their targets are functions with the group inside: a graph holds no argument that is not plain.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from shoal.comm import Group
from shoal.comm.differentiable import enter, gather, leave
from shoal.parallel.tensor.calls import Call
from shoal.parallel.tensor.sizes import is_symbolic, size
from shoal.parallel.tensor.split import Cut, Split

aten = torch.ops.aten
_OTHER = {
    "split_with_sizes": aten.split_with_sizes.default,
    "slice": aten.slice.Tensor,
    "mm": aten.mm.default,
    "bmm": aten.bmm.default,
}


def collective(graph: Graph, kind: str, value: Node, group: Group, *more: Any) -> Node:
    """A call of `enter`, `leave` or `gather` at the graph's point of insertion."""
    makers: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
        "enter": _enter,
        "leave": _leave,
        "gather": _gather,
    }
    return graph.call_function(makers[kind](group, *more), (value,))


def _enter(group: Group) -> Callable[[Tensor], Tensor]:
    def tensor_enter(value: Tensor) -> Tensor:
        return enter(value, group)

    return tensor_enter


def _leave(group: Group) -> Callable[[Tensor], Tensor]:
    def tensor_leave(value: Tensor) -> Tensor:
        return leave(value, group)

    return tensor_leave


def _gather(group: Group, dim: int, lengths: list[int]) -> Callable[[Tensor], Tensor]:
    def tensor_gather(value: Tensor) -> Tensor:
        return gather(value, dim, lengths, group)

    return tensor_gather


def take_part(graph: Graph, value: Node, cut: Cut, rank: int) -> Node:
    """This rank's part of a whole value, at the graph's point of insertion."""
    split = cut.split
    if split.outer == 1 and len(split.blocks) == 1:
        ((start, stop),) = split.ranges(rank) or [(0, 0)]
        return graph.call_function(aten.slice.Tensor, (value, cut.dim, start, stop))

    def tensor_part(whole: Tensor) -> Tensor:
        return part_of(whole, cut.dim, split, rank)

    return graph.call_function(tensor_part, (value,))


def part_of(whole: Tensor, dim: int, split: Split, rank: int) -> Tensor:
    """The part of `rank` of a whole tensor, in copies of a row of pieces."""
    rows = whole.unflatten(dim, (-1, split.row))  # type: ignore[no-untyped-call]
    pieces, start = [], 0
    for block in split.blocks:
        first, last = block.bounds[rank], block.bounds[rank + 1]
        pieces.append(rows.narrow(dim + 1, start + first, last - first))
        start += block.size
    return torch.cat(pieces, dim + 1).flatten(dim, dim + 1)


def look_up(node: Node, call: Call, first: int, last: int, padding: int | None) -> None:
    """Make an embedding look up only words ``first:last``, the rows of its weight."""
    own_padding = padding - first if padding is not None and first <= padding < last else None

    def tensor_look_up(weight: Tensor, indices: Tensor) -> Tensor:
        elsewhere = (indices < first) | (indices >= last)
        found = F.embedding((indices - first).masked_fill(elsewhere, 0), weight, own_padding)
        return found.masked_fill(elsewhere.unsqueeze(-1), 0.0)

    node.target = tensor_look_up
    node.args, node.kwargs = (call["weight"], call["indices"]), {}


def mean_part(node: Node, call: Call, count: int) -> None:
    """Make a mean over `count` elements this rank's part of it: its sum ÷ count."""
    dim, keep = call.get("dim"), bool(call.get("keepdim"))

    def tensor_mean_part(value: Tensor) -> Tensor:
        total = value.sum() if dim is None else value.sum(dim, keepdim=keep)
        return (total / count).to(value.dtype)  # autocast sums bf16 into float32

    node.target = tensor_mean_part
    node.args, node.kwargs = (call["self"],), {}


def add_bias(value: Tensor, bias: Tensor) -> Tensor:
    """A bias after a sum over ranks, in the sum's dtype: under autocast that is not the bias's."""
    return value + bias.to(value.dtype)


def set_arguments(node: Node, arguments: dict[str, Any]) -> None:
    """Give a node its arguments by name; under "target" another operator, the rest in its order."""
    if "target" in arguments:
        node.target = _OTHER[arguments["target"]]
        given = [value for name, value in arguments.items() if name != "target"]
        node.args, node.kwargs = tuple(given), {}
        return
    schema = node.target._schema  # type: ignore[union-attr]
    positional, named = [], {}
    for argument in schema.arguments:
        value = arguments[argument.name]
        if not argument.kwarg_only:
            positional.append(value)
        elif not argument.has_default_value() or value != argument.default_value:
            named[argument.name] = value
    while positional and len(positional) > len(node.args):
        argument = schema.arguments[len(positional) - 1]
        if not argument.has_default_value() or argument.default_value != positional[-1]:
            break
        positional.pop()
    node.args, node.kwargs = tuple(positional), named


def inherit(made: Node, source: Node, value: Any) -> None:
    """A node that was put in stands at the line and path of `source`."""
    for key in ("path", "line", "autocast", "stack_trace", "nn_module_stack"):
        if key in source.meta:
            made.meta[key] = source.meta[key]
    made.meta["val"] = value


def local_value(whole: Tensor, cut: Cut | None, rank: int) -> Tensor:
    """A fake tensor in the shape of this rank's part."""
    if cut is None:
        return whole
    sizes: list[Any] = list(whole.shape)
    split = cut.split
    if is_symbolic(size(sizes[cut.dim])):
        sizes[cut.dim] = sizes[cut.dim] // split.row * split.local_row(rank)
    else:
        sizes[cut.dim] = split.local(rank)
    return whole.new_empty(sizes)


def describe(node: Node, cut: Cut | None, rank: int) -> None:
    """``meta["cut"] = (dim, offset, global size, ranges)``: ranges where there are several.

    ``meta["split"] = (dim, Split, rank)`` says it in every case.
    """
    if cut is None:
        return
    split = cut.split
    ranges = tuple(split.ranges(rank))
    offset = ranges[0][0] if ranges else 0
    node.meta["cut"] = (cut.dim, offset, split.size, ranges if len(ranges) > 1 else ())
    node.meta["split"] = (cut.dim, split, rank)


def computed(target: Any, *arguments: Any) -> Any:
    """What an operation makes of fake values."""
    return target(*arguments)
