"""One node of the graph with its arguments by name, as its operator's schema has them.

call = Call(node)                    # aten.linear.default(x, w)
call["weight"], call["bias"]         # w, None
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from shoal.parallel.tensor.relation import Operand, Relation, Term
from shoal.parallel.tensor.sizes import shape


class Call:
    """Arguments by name (defaults filled in), and values."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.arguments: dict[str, Any] = {}
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return
        for position, argument in enumerate(schema.arguments):
            if position < len(node.args) and not argument.kwarg_only:
                self.arguments[argument.name] = node.args[position]
            elif argument.name in node.kwargs:
                self.arguments[argument.name] = node.kwargs[argument.name]
            else:
                self.arguments[argument.name] = (
                    argument.default_value if argument.has_default_value() else None
                )

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, otherwise: Any = None) -> Any:
        return self.arguments.get(name, otherwise)

    @property
    def name(self) -> str:
        """``linear`` of aten.linear.default."""
        return overload_name(self.node)[0]

    @property
    def value(self) -> Any:
        return self.node.meta.get("val")

    def tensors(self) -> list[tuple[str, int | None, Node]]:
        """The tensors among the arguments: ``(name, index in a list, node)``."""
        found: list[tuple[str, int | None, Node]] = []
        for name, given in self.arguments.items():
            if is_tensor(given):
                found.append((name, None, given))
            elif isinstance(given, list | tuple):
                found += [(name, at, each) for at, each in enumerate(given) if is_tensor(each)]
        return found

    def shape(self, name: str) -> list[int]:
        """Sizes of the tensor `name`."""
        return shape(self.arguments[name].meta["val"])

    def results(self) -> list[Tensor]:
        """The tensors that it makes; None among them stands for no tensor."""
        value = self.value
        return [value] if isinstance(value, Tensor) else list(value)

    def result(self) -> list[int]:
        return shape(self.results()[0])


def is_tensor(given: Any) -> bool:
    return isinstance(given, Node) and isinstance(given.meta.get("val"), Tensor)


def overload_name(node: Node) -> tuple[str, str]:
    """``("add_", "Tensor")`` of aten.add_.Tensor; the function's name for what is no operator."""
    if isinstance(node.target, torch._ops.OpOverload):
        packet = str(node.target.overloadpacket).rsplit(".", 1)[-1]
        return packet, node.target._overloadname
    return getattr(node.target, "__name__", str(node.target)), ""


def operand(relation: Relation, call: Call, name: str, terms: list[Term]) -> None:
    """Add the tensor argument `name`, if there is one."""
    given = call.get(name)
    if is_tensor(given):
        relation.operands.append(Operand(name, None, given, tuple(terms)))


def dims(given: Any, rank: int) -> list[int]:
    """Dimensions as a list counted from the front; all for none given."""
    if given is None or (isinstance(given, list | tuple) and not given):
        return list(range(rank))
    listed = given if isinstance(given, list | tuple) else [given]
    return [dim % rank if rank else 0 for dim in listed]
