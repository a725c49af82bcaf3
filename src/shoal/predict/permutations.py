"""Which units of a network can change places: one space for all tensors that must follow.

    x ─ linear 0 ─ ReLU ─ linear 2 ─ y          rows of 0.weight, 0.bias and columns of 2.weight
    a ─ conv ─┬──────── + ─                     are one space; what an add joins is one space, and
              └─ block ─┘                       the inputs' and outputs' places stay as they are

    spaces = spaces_of(model, inputs, rows=2)
    spaces[0].axes               # (Axis("0.weight", 0), Axis("0.bias", 0), Axis("2.weight", 1))
    permuted = permute(state, spaces[0], order)

The spaces are read off the model's trace, so that no list of models is needed; an operation that
has no rule is refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from shoal.errors import Refused
from shoal.trace import trace
from shoal.trace.normalise import op_name

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Axis:
    """A dimension of a tensor; each unit has ``repeat`` consecutive places in it."""

    name: str
    dim: int
    repeat: int = 1


@dataclass(frozen=True)
class Space:
    """Units that change places together, and every axis that they lie along."""

    units: int
    axes: tuple[Axis, ...]


def permute(state: State, space: Space, order: Tensor) -> dict[str, Tensor]:
    """The state with unit ``order[i]`` of `space` in place i. The others are not copied."""
    changed = dict(state)
    for axis in space.axes:
        places = order.unsqueeze(1) * axis.repeat + torch.arange(axis.repeat)
        changed[axis.name] = changed[axis.name].index_select(axis.dim, places.flatten())
    return changed


def spaces_of(model: nn.Module, inputs: Any, rows: int) -> tuple[Space, ...]:
    """The spaces of `model`, in the order of its computation; its mode is left as it was.

    ``inputs`` are an example of `rows` rows, two or more. Raises `Refused` for an operation through
    which it is not known how units pass.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        traced = trace(model, inputs, rows, split=False)
    finally:
        for module, training in modes.items():
            module.training = training
    walk = _Walk(traced.state)
    for node in traced.graph.nodes:
        if node.op == "placeholder" and node.name in traced.inputs:
            walk.begin(node)
        elif node.op == "call_function":
            walk.pass_through(node)
    for node in traced.outputs:
        walk.pin(walk.units[node].space)
    return walk.spaces()


@dataclass(frozen=True)
class _Units:
    """Where in a value the units of a space lie."""

    space: int
    dim: int
    repeat: int = 1


class _Walk:
    """What is known after each operation; spaces are joined as a union-find does."""

    def __init__(self, state: Mapping[str, str]) -> None:
        self._state = state
        self._parent: list[int] = []
        self._sizes: list[int] = []
        self._pinned: set[int] = set()
        self._axes: dict[tuple[str, int], tuple[int, int]] = {}  # to space and repeat
        self.units: dict[Node, _Units] = {}

    def begin(self, node: Node) -> None:
        """An input: whatever lies along its dimension 1 stays in its place."""
        shape = _shape(node)
        if len(shape) > 1:
            self.units[node] = _Units(self._new(int(shape[1])), 1)
            self.pin(self.units[node].space)

    def pass_through(self, node: Node) -> None:
        rule = _RULES.get(op_name(node))
        if rule is None:
            raise _refused(node)
        self.units[node] = rule(self, node)

    def spaces(self) -> tuple[Space, ...]:
        pinned = {self._root(space) for space in self._pinned}
        found: dict[int, list[Axis]] = {}
        for (name, dim), (space, repeat) in self._axes.items():
            if self._root(space) not in pinned:
                found.setdefault(self._root(space), []).append(Axis(name, dim, repeat))
        return tuple(Space(self._sizes[root], tuple(axes)) for root, axes in found.items())

    # ---- spaces

    def _new(self, size: int) -> int:
        self._parent.append(len(self._parent))
        self._sizes.append(size)
        return len(self._parent) - 1

    def _root(self, space: int) -> int:
        while self._parent[space] != space:
            space = self._parent[space]
        return space

    def pin(self, space: int) -> None:
        """Its units stay where they are."""
        self._pinned.add(space)

    def join(self, one: int, other: int, node: Node) -> int:
        first, second = sorted((self._root(one), self._root(other)))
        if self._sizes[first] != self._sizes[second]:
            raise _refused(node)
        self._parent[second] = first
        return first

    def lie(self, parameter: Any, dim: int, units: _Units, node: Node) -> None:
        """The units lie along a dimension of a parameter or buffer; None is none."""
        if parameter is None:
            return
        if not isinstance(parameter, Node) or parameter.name not in self._state:
            raise _refused(node)
        key = self._state[parameter.name], dim
        if key in self._axes:  # a tensor that is used twice
            space, repeat = self._axes[key]
            if repeat != units.repeat:
                raise _refused(node)
            self.join(space, units.space, node)
        self._axes[key] = units.space, units.repeat

    # ---- rules

    def of(self, value: Any, node: Node) -> _Units:
        if not isinstance(value, Node) or value not in self.units:
            raise _refused(node)
        return self.units[value]

    def same(self, node: Node) -> _Units:
        """Each element alone, or neighbours in other dimensions."""
        return self.of(node.args[0], node)

    def convolution(self, node: Node) -> _Units:
        units, weight, bias = self.of(node.args[0], node), *_arguments(node, "weight", "bias")
        groups, shape = int(_argument(node, 6, "groups", 1)), _shape(weight)
        if units.dim != 1 or units.repeat != 1:
            raise _refused(node)
        if groups > 1 and groups == shape[0]:  # each channel alone
            self.lie(weight, 0, units, node)
            self.lie(bias, 0, units, node)
            return units
        if groups > 1:  # channels of a group belong together
            self.pin(units.space)
        else:
            self.lie(weight, 1, units, node)
        after = _Units(self._new(int(shape[0])), 1)
        if groups > 1:
            self.pin(after.space)
        self.lie(weight, 0, after, node)
        self.lie(bias, 0, after, node)
        return after

    def linear(self, node: Node) -> _Units:
        units, weight, bias = self.of(node.args[0], node), *_arguments(node, "weight", "bias")
        last = len(_shape(node)) - 1
        if units.dim != last:
            raise _refused(node)
        self.lie(weight, 1, units, node)
        after = _Units(self._new(int(_shape(weight)[0])), last)
        self.lie(weight, 0, after, node)
        self.lie(bias, 0, after, node)
        return after

    def batch_norm(self, node: Node) -> _Units:
        units = self.of(node.args[0], node)
        if units.dim != 1 or units.repeat != 1:
            raise _refused(node)
        for place, key in enumerate(("weight", "bias", "running_mean", "running_var"), start=1):
            self.lie(_argument(node, place, key), 0, units, node)
        return units

    def layer_norm(self, node: Node) -> _Units:
        """Over the units alone: their order is nothing to it."""
        units = self.of(node.args[0], node)
        over: Any = _argument(node, 1, "normalized_shape")
        if len(over) != 1 or units.dim != len(_shape(node)) - 1:
            raise _refused(node)
        self.lie(_argument(node, 2, "weight"), 0, units, node)
        self.lie(_argument(node, 3, "bias"), 0, units, node)
        return units

    def group_norm(self, node: Node) -> _Units:
        """Channels of a group belong together: they stay where they are."""
        units = self.of(node.args[0], node)
        self.pin(units.space)
        return units

    def joined(self, node: Node) -> _Units:
        """Two values, unit by unit; or a value and a number."""
        first, second = node.args[0], node.args[1]
        if not isinstance(second, Node):
            return self.of(first, node)
        if not isinstance(first, Node):
            return self.of(second, node)
        one, other = self.of(first, node), self.of(second, node)
        if (one.dim, one.repeat) != (other.dim, other.repeat):
            raise _refused(node)
        if len(_shape(first)) != len(_shape(second)):
            raise _refused(node)
        return _Units(self.join(one.space, other.space, node), one.dim, one.repeat)

    def mean(self, node: Node) -> _Units:
        units, before = self.of(node.args[0], node), len(_shape(node.args[0]))
        over: Any = _argument(node, 1, "dim")
        dims = {dim % before for dim in ([over] if isinstance(over, int) else over or ())}
        if not dims or units.dim in dims:
            raise _refused(node)
        kept = bool(_argument(node, 2, "keepdim", False))
        dim = units.dim if kept else units.dim - sum(each < units.dim for each in dims)
        return _Units(units.space, dim, units.repeat)

    def flatten(self, node: Node) -> _Units:
        """[n, C, H, W] to [n, C·H·W]: each unit has H·W places."""
        units, before, after = self.of(node.args[0], node), _shape(node.args[0]), _shape(node)
        inner = 1
        for size in before[2:]:
            inner *= int(size)
        if len(after) != 2 or units.dim != 1 or int(after[1]) != int(before[1]) * inner:
            raise _refused(node)
        return _Units(units.space, 1, units.repeat * inner)

    def moved(self, node: Node) -> _Units:
        units, dims = self.of(node.args[0], node), len(_shape(node))
        if op_name(node) == "permute":
            order = [int(each) % dims for each in node.args[1]]  # type: ignore[union-attr,arg-type]
        else:
            one, other = (int(each) % dims for each in node.args[1:3])  # type: ignore[arg-type]
            order = list(range(dims))
            order[one], order[other] = other, one
        return _Units(units.space, order.index(units.dim), units.repeat)


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _argument(node: Node, place: int, key: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(key, default)


def _arguments(node: Node, *keys: str) -> list[Any]:
    return [_argument(node, place, key) for place, key in enumerate(keys, start=1)]


def _refused(node: Node) -> Refused:
    where = f" at {node.meta['line']}" if node.meta.get("line") else ""
    return Refused(
        f"it is not known how units pass through {op_name(node)}{where}",
        hint="matched-mean works on chains of linear layers, convolutions and norms with skips; "
        "--how mean, greedy-soup and ensemble need no matching.",
    )


_SAME = (
    *("relu", "relu6", "gelu", "silu", "mish", "sigmoid", "tanh", "leaky_relu", "elu", "selu"),
    *("hardtanh", "hardswish", "hardsigmoid", "softplus", "neg", "abs", "square", "clamp"),
    *("dropout", "clone", "contiguous", "detach", "alias", "to", "_to_copy"),
    *("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("_upsample_bilinear2d_aa", "upsample_bilinear2d", "upsample_nearest2d"),
)
_RULES: dict[str, Callable[[_Walk, Node], _Units]] = {
    **dict.fromkeys(_SAME, _Walk.same),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _Walk.convolution),
    **dict.fromkeys(("add", "sub", "mul"), _Walk.joined),
    **dict.fromkeys(("flatten", "view", "reshape", "_unsafe_view"), _Walk.flatten),
    **dict.fromkeys(("permute", "transpose"), _Walk.moved),
    "linear": _Walk.linear,
    "batch_norm": _Walk.batch_norm,
    "layer_norm": _Walk.layer_norm,
    "group_norm": _Walk.group_norm,
    "mean": _Walk.mean,
}
