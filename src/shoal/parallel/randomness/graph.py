"""Dropout in a traced graph: nodes that drop the elements which eager modules would.

    use_counted_randomness(traced, key)        # every dropout of traced.graph, in place
    key.begin(step, rows, rank)                # then run the graph: rows of any microbatch

A node's name is its ``meta["path"]`` and ``meta["call"]``, as of an eager call; where its rows are
is read off its shape, whose batch dimension is symbolic; ``meta["cut"]`` says which part of the
value is here. All else that draws random numbers is refused: its result would depend on the cut.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Graph, Node

from shoal.errors import Refused
from shoal.parallel.randomness.key import StepKey, call_place
from shoal.parallel.randomness.masks import FIND, Cut, Place
from shoal.parallel.randomness.ops import ATTENTION, KINDS, Attention, attend, drop

_LIBRARIES = ("/torch/", str(Path(__file__).parent))

__all__ = ["CountedAttention", "CountedDrop", "use_counted_randomness"]


class HasGraph(Protocol):
    @property
    def graph(self) -> Graph: ...


@dataclass(eq=False)
class _Node:
    """The target of a node: called with tensors alone, all else is known here."""

    key: StepKey
    name: str
    place: Place

    def __post_init__(self) -> None:
        # What fx asks of a target to write code that calls it.
        self.__name__ = self.__qualname__ = type(self).__name__
        self.__module__ = __name__


@dataclass(eq=False)
class CountedDrop(_Node):
    """Drops elements of its input."""

    kind: str
    probability: float
    inplace: bool

    def __call__(self, input: Tensor) -> Any:
        if self.kind != "native_dropout":
            return self._drop(input)
        kept = self._drop(torch.ones_like(input)) != 0
        return input * kept * (
            1.0 / (1.0 - self.probability) if self.probability < 1.0 else 0.0
        ), kept

    def _drop(self, input: Tensor) -> Tensor:
        options: dict[str, Any] = {"inplace": self.inplace, "place": self.place}
        return drop(self.key, self.name, self.kind, input, self.probability, **options)


@dataclass(eq=False)
class CountedAttention(_Node):
    """Attention that drops some of its weights."""

    told: Attention

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return attend(self.key, self.name, (q, k, v, mask), self.told, self.place)


def use_counted_randomness(traced: HasGraph, key: StepKey) -> int:
    """Replace every dropout in the graph of `traced`; how many there were.

    To be called on a whole graph, before it is cut into segments, and after ``key.know(model)``,
    where a module may have several names. Raises `Refused` for any other
    random operation, with the user's line.
    """
    graph, found = traced.graph, 0
    calls: Counter[str] = Counter()
    symbolic = any(_symbolic_dims(node) for node in graph.nodes if node.op == "placeholder")
    for node in list(graph.nodes):
        if node.op != "call_function" or not _draws(node.target):
            continue
        kind, told = _kind(node.target), _arguments(node)
        if kind != ATTENTION and _harmless(told):
            continue
        if kind not in KINDS and kind != ATTENTION:
            raise _refused(node)
        path = _path(node)
        place = call_place(key.aliases.get(path, path), kind)
        # Of a module with several names, calls under all of them count on.
        number = calls[place] if path in key.aliases else node.meta.get("call", calls[place])
        calls[place] += 1
        if not _harmless(told):
            where = _place(node, symbolic)
            _replace(node, _counted(node, _Node(key, f"{place}{number}", where), told), told)
            found += 1
    return found


def _draws(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _kind(target: Any) -> str:
    """``aten::dropout_`` is of the kind "dropout"."""
    return str(target._schema.name).removeprefix("aten::").removesuffix("_")


def _arguments(node: Node) -> dict[str, Any]:
    """All arguments of an operation by name, with its defaults."""
    told = {}
    for index, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        default = argument.default_value if argument.has_default_value() else None
        positional = node.args[index] if index < len(node.args) else default
        told[argument.name] = node.kwargs.get(argument.name, positional)
    return told


def _harmless(told: dict[str, Any]) -> bool:
    """Whether an operation that may draw random numbers does not, told this."""
    if any(told.get(name, True) is False for name in ("train", "training")):
        return True
    if (
        any(told.get(name) == 0.0 for name in ("dropout_p", "dropout"))
        or told.get("num_layers") == 1
    ):
        return True
    return "train" in told and told.get("p") == 0.0


def _path(node: Node) -> str:
    """The path of the module that ran it."""
    if "path" in node.meta:
        return str(node.meta["path"])
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    # A module's second call is its path with "@1" behind one of the names.
    parts = str(stack[-1][0]).split(".") if stack else [""]
    return ".".join(part.partition("@")[0] for part in parts)


def _place(node: Node, symbolic: bool) -> Place:
    """Where its rows are, by the batch's symbol in its first argument's shape; its cut."""
    value = node.args[0] if node.args else next(iter(node.kwargs.values()))
    dims = _symbolic_dims(value) if isinstance(value, Node) else []
    rows_at = (dims[0] if dims else None) if symbolic else FIND
    cut = node.meta.get("cut")
    return Place(rows_at, Cut(*cut) if cut is not None else None)


def _symbolic_dims(node: Node) -> list[int]:
    shape = getattr(node.meta.get("val"), "shape", ())
    return [dim for dim, size in enumerate(shape) if not isinstance(size, int)]


def _counted(node: Node, known: _Node, told: dict[str, Any]) -> _Node:
    kind, common = _kind(node.target), (known.key, known.name, known.place)
    if kind != ATTENTION:
        inplace = str(node.target._schema.name).endswith("_")  # type: ignore[union-attr]
        return CountedDrop(*common, kind, told["p"], inplace)
    names = ("dropout_p", "is_causal", "scale", "enable_gqa")
    return CountedAttention(*common, Attention(*(told[name] for name in names)))


def _replace(node: Node, target: Any, told: dict[str, Any]) -> None:
    """The same node, with another target: its name, users and meta stay."""
    tensors = [
        told[n] for n in ("input", "self", "query", "key", "value", "attn_mask") if n in told
    ]
    node.target = target
    node.args, node.kwargs = tuple(tensors), {}


def _refused(node: Node) -> Refused:
    line = node.meta.get("line") or users_line(node)
    path = _path(node)
    where = f" in {path}" if path else ""
    return Refused(
        f"{_kind(node.target)}{where} draws random numbers that would depend on how the model is "
        f"cut{f' ({line})' if line else ''}",
        hint="Draw them before the model and give them as an input, or use dropout (layers, "
        "functions, attention's dropout_p), whose masks do not depend on the cut; between the "
        "layers of an LSTM or GRU, that is one layer each with nn.Dropout between. Or train with "
        "a strategy of replicas alone (dp).",
    )


def users_line(node: Node) -> str | None:
    """The innermost line of the stack that is not torch's."""
    lines = [line.strip() for line in (node.stack_trace or "").splitlines()]
    own = [
        f"{line}: {lines[index + 1]}" if index + 1 < len(lines) else line
        for index, line in enumerate(lines)
        if line.startswith("File ") and not any(part in line for part in _LIBRARIES)
    ]
    return own[-1] if own else None
