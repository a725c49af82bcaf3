"""Bytes that a rank gives to the collectives of a rewritten graph, counted from the graph.

comm_bytes(mine, rows=8)                 # {"all_reduce": 81920}, forward and backward
loss_bytes(labels=64)                    # a cross-entropy over scores that stay cut
"""

from typing import Any

from torch.fx import Graph

from shoal.parallel.tensor.plan import Graphed


def comm_bytes(mine: Graphed, rows: int, *, training: bool = True) -> dict[str, int]:
    """By collective, for one forward pass over `rows` examples, and its backward if `training`.

    Payload as `shoal.comm` counts it, in the dtypes that were traced (autocast makes some smaller).
    """
    return graph_bytes(mine.graph, rows, training=training)


def graph_bytes(graph: Graph, rows: int, *, training: bool = True) -> dict[str, int]:
    """`comm_bytes` of a graph, which may be one segment's."""
    found: dict[str, int] = {}
    for node in graph.nodes:
        for moved, late, shape in node.meta.get("moves", ()):
            if training or not late:
                sizes = [_at(number, rows) for number in shape]
                bytes_moved = _product(sizes) * node.meta["val"].dtype.itemsize
                found[moved] = found.get(moved, 0) + bytes_moved
        if "collective" not in node.meta:
            continue
        kind, backward = node.meta["collective"]
        if training or not backward:
            given = node.all_input_nodes[0] if kind == "all_gather" else node
            sizes = [_at(number, rows) for number in given.meta["val"].shape]
            if kind == "all_gather":  # of uneven parts the longest is sent by all
                dim, longest = node.meta["longest"]
                sizes[dim] = longest
            found[kind] = found.get(kind, 0) + _product(sizes) * node.meta["val"].dtype.itemsize
    return found


def loss_bytes(labels: int, *, itemsize: int = 4, smoothed: bool = False) -> int:
    """All-reduced by a cross-entropy of `labels` labels over scores that stay cut."""
    return labels * itemsize * (4 if smoothed else 3)


def _at(number: Any, rows: int) -> int:
    if isinstance(number, int):
        return number
    expression = number.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, rows)))


def _product(sizes: list[int]) -> int:
    result = 1
    for number in sizes:
        result *= number
    return result
