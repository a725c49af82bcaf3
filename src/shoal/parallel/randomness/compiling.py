"""Compiled models: a functional dropout in them is refused, since its masks would be torch's own.

    model.compile(dynamic=False, backend=counting_backend)

The compiler hands the graph of each part of the model to this backend, which looks through it and
lets torch's default one compile it. Layers (`CountedDropout`) are not in it: they run uncompiled,
as do torch's own modules that hold some (an encoder layer), whose functions are intercepted.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from shoal.errors import Refused
from shoal.parallel.randomness.functional import Interception, drops
from shoal.parallel.randomness.graph import users_line
from shoal.parallel.randomness.layers import CountedDropout
from shoal.parallel.specialise import keep_uncompiled


def keep_masks_uncompiled() -> None:
    """Have the compiler leave out what makes masks: their key is a number of the step.

    A graph would hold the number, and be good for one step.
    """
    keep_uncompiled(CountedDropout, "drop")
    keep_uncompiled(Interception, "answer")
    # Called by torch while the interpreter runs a model, it would be compiled by itself, as if it
    # were a part of a graph.
    torch._dynamo.eval_frame.skip_code(Interception.__torch_function__.__code__)


def counting_backend(graph: GraphModule, inputs: Any) -> Callable[..., Any]:
    """Compile `graph` as torch does by default. Raises `Refused` where it drops elements."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and _draws(node):
            raise _refused(node)
    return torch._dynamo.lookup_backend("inductor")(graph, inputs)


def _draws(node: Node) -> bool:
    if node.target is F.multi_head_attention_forward:
        return bool(node.kwargs.get("training", True)) and _value(node, "dropout_p", 10) != 0.0
    if not drops(node.target):
        return False
    if node.target is F.scaled_dot_product_attention:
        return _value(node, "dropout_p", 4) not in (0.0, None)
    train = node.kwargs.get("train", _value(node, "training", 2))
    return train is not False and _value(node, "p", 1) != 0.0


def _value(node: Node, name: str, position: int) -> Any:
    given = node.args[position] if len(node.args) > position else None
    return node.kwargs.get(name, given)


def _refused(node: Node) -> Refused:
    name = getattr(node.target, "__name__", str(node.target))
    line = users_line(node)
    where = f" ({line})" if line else ""
    return Refused(
        f"compile: {name} drops elements within a compiled model{where}, and its masks would "
        "depend on the split",
        hint="Use the layer (torch.nn.Dropout and its kin), leave +compile out, or set that "
        "dropout to 0.",
    )
