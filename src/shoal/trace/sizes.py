"""Sizes that depend on the number of rows, computed from a model input's size.

    n = sym_size(activation, 0)     →   n = sym_size(input, 0)

    sizes_from_inputs(graph, ("x",))

So a size needs no activation, and every segment of a cut graph can compute it for itself.
"""

import operator
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.utils._sympy.functions import FloorDiv

aten = torch.ops.aten


def sizes_from_inputs(graph: Graph, inputs: tuple[str, ...]) -> None:
    """Rewrite every size of an activation whose value follows from the number of rows."""
    known: dict[Any, Node] = {}
    places = [node for node in graph.nodes if node.op == "placeholder" and node.name in inputs]
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.sym_size.int:
            continue
        value = node.meta.get("val")
        if not isinstance(value, SymInt) or node.args[0] in places:
            continue
        with graph.inserting_before(node):
            made = _made(graph, value.node.expr, places, known)
        if isinstance(made, Node):
            node.replace_all_uses_with(made)
            graph.erase_node(node)


def _made(graph: Graph, expr: Any, places: list[Node], known: dict[Any, Node]) -> Any:
    """A node, or a number, that computes ``expr``; None where that is not possible."""
    if isinstance(expr, sympy.Integer | int):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return _rows(graph, expr, places, known)
    kinds = {sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv}
    function = kinds.get(type(expr))
    if function is None:
        return None
    made = [_made(graph, part, places, known) for part in expr.args]
    if any(part is None for part in made):
        return None
    result = made[0]
    for part in made[1:]:
        result = graph.call_function(function, (result, part))
    return result


def _rows(graph: Graph, symbol: Any, places: list[Node], known: dict[Any, Node]) -> Node | None:
    if symbol in known:
        return known[symbol]
    for place in places:
        value = place.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if isinstance(size, SymInt) and size.node.expr == symbol:
                with graph.inserting_after(places[-1]):
                    node = graph.call_function(aten.sym_size.int, (place, dim))
                node.meta["val"] = size
                known[symbol] = node
                return node
    return None
