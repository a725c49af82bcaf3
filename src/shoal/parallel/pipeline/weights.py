"""Backward passes in two halves: what a stage's inputs need now, what its weights need later.

    y = x·Wᵀ + b        I:  dx = dy·W             W:  dW = dyᵀ·x,  db = Σ dy

    later = Later()
    split_weights(traced, later)                 # linear, matrix products, convolutions
    later.at = (stage, microbatch)
    torch.autograd.backward(…)                   # I: leaves W's part undone
    later.run(stage, microbatch)                 # W

So zero-bubble schedules need no second walk through the graph (torch's own `stage_backward_input`
walks it twice). Parameters that come into the graph in other ways (norms, embeddings, biases that
are added) get their gradients in I.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx import Graph, Node
from torch.nn import functional

aten = torch.ops.aten


class HasState(Protocol):
    """A traced graph, as far as it is needed here."""

    graph: Graph
    state: dict[str, str]
    parameters: frozenset[str]


class Later:
    """The gradients of weights that are still to be computed, by (stage, microbatch)."""

    def __init__(self) -> None:
        self._work: defaultdict[tuple[int, int], list[Callable[[], None]]] = defaultdict(list)
        self.at = (0, 0)

    def put(self, work: Callable[[], None]) -> None:
        self._work[self.at].append(work)

    def run(self, stage: int, microbatch: int) -> None:
        """Compute what the backward pass of this microbatch has left undone."""
        with torch.no_grad():
            for work in self._work.pop((stage, microbatch), ()):
                work()

    def clear(self) -> None:
        """Forget everything: a step has failed."""
        self._work.clear()


def split_weights(traced: HasState, later: Later) -> int:
    """Replace nodes that multiply by a parameter; how many there were."""
    weights = {name for name, path in traced.state.items() if path in traced.parameters}
    found = 0
    for node in traced.graph.nodes:
        if node.op != "call_function" or node.kwargs:
            continue
        made = _replacement(node, weights, later)
        if made is not None:
            node.target, node.args = made
            found += 1
    return found


def _replacement(node: Node, weights: set[str], later: Later) -> tuple[Any, Any] | None:
    arguments = list(node.args)
    if node.target is aten.addmm.default:
        bias, input, weight = arguments
        if _is(bias, weights, dims=1) and _is(weight, weights, dims=2):
            return _Product(later, transposed=False), (input, weight, bias)
    elif node.target in (aten.linear.default, aten.matmul.default, aten.mm.default):
        weight, bias = arguments[1], (*arguments, None)[2]
        fits = bias is None or _is(bias, weights, dims=1)
        if _is(weight, weights, dims=2) and not _is(arguments[0], weights) and fits:
            linear = node.target is aten.linear.default
            return _Product(later, transposed=linear), (arguments[0], weight, bias)
    elif node.target in _CONVOLUTIONS:
        dims = _CONVOLUTIONS[node.target]
        bias = (*arguments, None)[2]
        if _is(arguments[1], weights) and (bias is None or _is(bias, weights)):
            return _Convolution(later, node.target, dims), tuple(arguments)
    return None


def _is(value: Any, weights: set[str], dims: int | None = None) -> bool:
    if not isinstance(value, Node) or value.name not in weights:
        return False
    return dims is None or value.meta["val"].dim() == dims


_CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}


class _Product:
    """The function of a node: ``(input, weight, bias)``; ``transposed`` for weights [out, in]."""

    __name__ = "product_with_later_weights"

    def __init__(self, later: Later, *, transposed: bool) -> None:
        self._later, self._transposed = later, transposed

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        input, dtype = _as_autocast(input)
        return _ProductFunction.apply(input, weight, bias, dtype, self._transposed, self._later)  # type: ignore[no-any-return,no-untyped-call]


class _ProductFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        transposed: bool,
        later: Later,
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.weight, ctx.bias, ctx.dtype, ctx.transposed, ctx.later = (
            weight, bias, dtype, transposed, later
        )  # fmt: skip
        used = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        return functional.linear(input, used if transposed else used.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        weight, bias, transposed = ctx.weight, ctx.bias, ctx.transposed
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]

        def work() -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])
            if needs_weight:
                inputs = input.reshape(-1, input.shape[-1])
                accumulate(weight, rows.t() @ inputs if transposed else inputs.t() @ rows)
            if needs_bias:
                accumulate(bias, rows.sum(0))

        if needs_weight or needs_bias:
            ctx.later.put(work)
        if not needs_input:
            return (None,) * 6
        used = weight.to(ctx.dtype)
        return (gradient @ (used if transposed else used.t()), *(None,) * 5)


class _Convolution:
    """The function of a convolution's node, with the node's own arguments."""

    __name__ = "convolution_with_later_weights"

    def __init__(self, later: Later, target: Any, dims: int) -> None:
        self._later, self._target, self._dims = later, target, dims

    def __call__(
        self, input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any
    ) -> Tensor:
        input, dtype = _as_autocast(input)
        given: list[Any] = [*options, *(1, 0, 1, 1)[len(options) :]]
        sizes, groups = [_for_each(value, self._dims) for value in given[:3]], given[3]
        how = (*sizes, False, [0] * self._dims, groups)
        return _ConvolutionFunction.apply(  # type: ignore[no-any-return,no-untyped-call]
            input, weight, bias, dtype, how, self._later
        )


class _ConvolutionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        how: tuple[Any, ...],
        later: Later,
    ) -> Tensor:
        ctx.save_for_backward(input)
        ctx.weight, ctx.bias, ctx.dtype, ctx.how, ctx.later = weight, bias, dtype, how, later
        bias = None if bias is None else bias.to(dtype)
        return torch.convolution(input, weight.to(dtype), bias, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        weight, bias, how, dtype = ctx.weight, ctx.bias, ctx.how, ctx.dtype
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]

        def pull(mask: list[bool]) -> Any:
            sizes = None if bias is None else list(bias.shape)
            # Only its shape counts for its own gradient; by then its memory may be gone (zero3).
            used = weight.to(dtype) if mask[0] else torch.empty_like(weight, dtype=dtype)
            return aten.convolution_backward(gradient, input, used, sizes, *how, mask)

        def work() -> None:
            _, of_weight, of_bias = pull([False, needs_weight, needs_bias])
            if needs_weight:
                accumulate(weight, of_weight)
            if needs_bias:
                accumulate(bias, of_bias)

        if needs_weight or needs_bias:
            ctx.later.put(work)
        of_input = pull([True, False, False])[0] if needs_input else None
        return (of_input, *(None,) * 5)


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add to a parameter's gradient, as autograd would."""
    gradient = gradient.to(parameter.dtype)
    if parameter.grad is None:
        # With the parameter's strides: optimizers are slow over others.
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    else:
        parameter.grad.add_(gradient)


def _as_autocast(input: Tensor) -> tuple[Tensor, torch.dtype]:
    """What autocast would make of the input of a product, and of its weight."""
    kind = input.device.type
    if torch.is_autocast_enabled(kind) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        return input.to(dtype), dtype
    return input, input.dtype


def _for_each(value: Any, dims: int) -> list[int]:
    """One number for each dimension."""
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values
