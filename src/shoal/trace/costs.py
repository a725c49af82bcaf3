"""What a graph's operations cost, counted: enough to cut it into stages of equal time.

    seconds = 3 · (FLOPs ÷ 50 GFLOP/s + bytes ÷ 10 GB/s)

Three, as the backward pass of an operation costs about two forward ones (Narayanan et al. 2021,
appendix). The rates are a CPU core's, rounded; only their quotient matters to a cut. Every rank
counts the same numbers, which times measured on each would not be.

    costs = seconds_of(graph)                  # {node's name: seconds for the traced rows}
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import SymInt, Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from shoal.trace.aliases import is_getitem, shares_with
from shoal.trace.normalise import op_name

FLOPS_PER_S = 50e9
BYTES_PER_S = 10e9
PASSES = 3  # forward, and backward for two

_PRODUCTS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm")


def seconds_of(graph: Graph) -> dict[str, float]:
    """Seconds, forward and backward, of every operation, by name; 0 where no value was traced.

    ``meta["seconds"]`` of a node is believed.
    """
    return {
        node.name: node.meta["seconds"]
        if "seconds" in node.meta
        else PASSES * (_flops(node) / FLOPS_PER_S + _bytes(node) / BYTES_PER_S)
        for node in graph.nodes
        if node.op not in ("placeholder", "output")
    }


def bytes_of(node: Node) -> int:
    """The bytes of a traced value, for the traced number of rows; 0 for a number."""
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return sum(_numel(v.shape) * v.element_size() for v in values if isinstance(v, Tensor))


def _bytes(node: Node) -> int:
    """What a pass over inputs and result moves; views move nothing, a look-up only its rows."""
    if is_getitem(node) or not isinstance(node.target, OpOverload):
        return 0
    if shares_with(node) and op_name(node) not in ("reshape", "contiguous"):
        return 0
    if op_name(node) == "embedding":
        return 2 * bytes_of(node)
    return bytes_of(node) + sum(bytes_of(given) for given in node.all_input_nodes)


def _flops(node: Node) -> float:
    name, out = op_name(node), node.meta.get("val")
    shapes = [_shape(given) for given in node.all_input_nodes]
    if isinstance(out, list | tuple):
        out = out[0] if out else None
    if not isinstance(out, Tensor) or not shapes:
        return 0.0
    results = _numel(out.shape)
    if name in _PRODUCTS:
        # addmm and baddbmm have the sum first.
        given = shapes[1] if name in ("addmm", "baddbmm") else shapes[0]
        return 2.0 * results * (given[-1] if given else 1)
    if name.startswith("conv") and len(shapes) > 1:
        return 2.0 * results * math.prod(shapes[1][1:])
    if name == "scaled_dot_product_attention" and len(shapes) > 1:
        return 4.0 * _product(shapes[0]) * (shapes[1][-2] if len(shapes[1]) > 1 else 1)
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        steps = _product(shapes[0][:2])
        return 2.0 * steps * sum(_product(shape) for shape in shapes[1:] if len(shape) == 2)
    if name == "einsum":
        return 2.0 * math.sqrt(results * math.prod(_product(shape) for shape in shapes))
    return 0.0


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(_number(size) for size in value.shape) if isinstance(value, Tensor) else ()


def _numel(shape: Sequence[Any]) -> int:
    return _product([_number(size) for size in shape])


def _product(sizes: Sequence[int]) -> int:
    return math.prod(sizes)


def _number(size: Any) -> int:
    """A size as it was in the trace."""
    if not isinstance(size, SymInt):
        return int(size)
    hint = size.node.hint
    return int(hint) if hint is not None else 1
