"""`relate`: for a node of the graph what it does with its dimensions.

    relation = relate(node)                    # None where no rule fits

A rule is found by the operator's name, whatever its overload and with or without the underscore of
an in-place one; operators that torch tags as point-wise need none.
"""

import torch
from torch.fx import Node

from shoal.parallel.tensor import layers, reductions, shapes
from shoal.parallel.tensor.calls import Call, overload_name
from shoal.parallel.tensor.relation import Relation
from shoal.parallel.tensor.rules import POINTWISE, find, pointwise

TABLES = (layers, reductions, shapes)  # modules whose import fills the table


def relate(node: Node) -> Relation | None:
    """The labels of one node that makes tensors from tensors; None where no rule fits."""
    name, _ = overload_name(node)
    call = Call(node)
    found = find(name)
    if found is not None:
        return found(call)
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags or name.removesuffix("_") in POINTWISE:
        return pointwise(call)
    return None
