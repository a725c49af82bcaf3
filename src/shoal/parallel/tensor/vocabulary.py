"""Scores over a vocabulary that is cut over the ranks, and losses of them that never gather them.

    scores [n, C]       this rank has columns first:last
    log Σ exp           largest over ranks, then Σ exp(score − largest) summed over ranks
    loss                log Σ exp − (1 − ε)·score[target] − ε/C·Σ scores

    outputs = wrap(outputs, mine, group)       # tensors that look whole to a loss function
    loss_fn(outputs, targets)                  # cross_entropy and log_softmax run on the parts

`CutScores` has the whole's shape. Reshapes, slices of rows, casts, products with a number, and the
losses below work on the part; anything else gathers first: right, and slower. What a loss moves is
two collectives of one (then two or three) numbers a row, forward; nothing backward.

Source: Shoeybi et al. 2019 (arXiv 1909.08053, section 3); label smoothing as torch has it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from shoal.comm import Group
from shoal.comm.differentiable import gather, leave


@dataclass(frozen=True)
class Range:
    """Rank r has classes ``bounds[r]:bounds[r + 1]``; `group` are the ranks."""

    bounds: tuple[int, ...]
    group: Group

    @property
    def first(self) -> int:
        return self.bounds[self.group.rank]

    @property
    def last(self) -> int:
        return self.bounds[self.group.rank + 1]

    @property
    def classes(self) -> int:
        return self.bounds[-1]

    @property
    def lengths(self) -> list[int]:
        return [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]


class CrossEntropyRows(torch.autograd.Function):
    """``(scores [n, my classes], labels [n], smoothing, range) → loss [n]``, the same on all ranks.

    A row whose label is negative loses nothing.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor, smoothing: float, mine: Range) -> Tensor:
        kind = torch.promote_types(scores.dtype, torch.float32)
        shifted = scores.to(kind)
        largest = mine.group.all_reduce(shifted.amax(1), "activation", largest=True)
        shifted = shifted - largest.unsqueeze(1)
        exponentials = shifted.exp()
        here, column = _own_columns(labels, mine)
        at_label = shifted.gather(1, column).squeeze(1) * here
        parts = [exponentials.sum(1), at_label]
        if smoothing:
            parts.append(shifted.sum(1))
        sums = mine.group.all_reduce(torch.stack(parts), "activation")
        loss = sums[0].log() - (1 - smoothing) * sums[1]
        if smoothing:
            loss = loss - smoothing / mine.classes * sums[2]
        ctx.smoothing, ctx.classes, ctx.kind = smoothing, mine.classes, scores.dtype
        ctx.save_for_backward(exponentials / sums[0].unsqueeze(1), column, here, labels >= 0)
        return loss * (labels >= 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        probability, column, here, counted = ctx.saved_tensors
        slope = probability - ctx.smoothing / ctx.classes
        target = ((1 - ctx.smoothing) * here.to(slope.dtype)).unsqueeze(1)
        slope = slope.scatter_add(1, column, -target)
        return (slope * (gradients[0] * counted).unsqueeze(1)).to(ctx.kind), None, None, None


class LogSoftmaxPart(torch.autograd.Function):
    """``(scores [n, my classes], range) → log softmax [n, my classes]`` over all classes."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mine: Range) -> Tensor:
        largest = mine.group.all_reduce(scores.amax(1), "activation", largest=True)
        shifted = scores - largest.unsqueeze(1)
        total = mine.group.all_reduce(shifted.exp().sum(1), "activation")
        result = shifted - total.log().unsqueeze(1)
        ctx.group = mine.group
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        total = ctx.group.all_reduce(gradients[0].sum(1), "activation")
        return gradients[0] - result.exp() * total.unsqueeze(1), None


def _own_columns(labels: Tensor, mine: Range) -> tuple[Tensor, Tensor]:
    """Which labels are among this rank's classes, and their columns [n, 1], 0 for the others."""
    here = (labels >= mine.first) & (labels < mine.last)
    return here, (labels - mine.first).masked_fill(~here, 0).unsqueeze(1)


class CutScores(Tensor):
    """A tensor that looks whole, of which each rank has a part along ``cut_dim``."""

    local: Tensor
    cut_dim: int
    range: Range
    _whole: Tensor | None

    @staticmethod
    def __new__(cls: type["CutScores"], local: Tensor, dim: int, mine: Range) -> "CutScores":
        size = list(local.shape)
        size[dim] = mine.classes
        made: CutScores = torch.Tensor._make_wrapper_subclass(
            cls, size, dtype=local.dtype, device=local.device, requires_grad=local.requires_grad
        )
        made.local, made.cut_dim, made.range, made._whole = local, dim, mine, None
        return made

    def __init__(self, local: Tensor, dim: int, mine: Range) -> None:
        super().__init__()

    def whole(self) -> Tensor:
        """All classes on every rank. Collective."""
        with torch._C.DisableTorchFunctionSubclass():
            if self._whole is None:
                lengths, group = self.range.lengths, self.range.group
                self._whole = gather(self.local, self.cut_dim, lengths, group)
            return self._whole

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CutScores({tuple(self.shape)}, cut along {self.cut_dim})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in _ASKED or (name == "__get__" and _attribute(func) in _ASKED):
                return func(*args, **given)
            handler = _HANDLERS.get(name)
            if handler is not None and args and isinstance(args[0], CutScores):
                result = handler(func, args[0], tuple(args[1:]), given)
                if result is not NotImplemented:
                    return result
        plain = [_plain(each) for each in args]
        return func(*plain, **{key: _plain(value) for key, value in given.items()})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = [_plain(each) for each in args]
        return func(*plain, **{key: _plain(value) for key, value in (kwargs or {}).items()})


_ASKED = {"shape", "dtype", "device", "ndim", "requires_grad", "is_floating_point", "is_complex",
          "dim", "size", "numel", "nelement", "layout", "is_sparse", "is_cuda", "__len__",
          "__repr__",
          "element_size", "itemsize", "is_nested", "is_quantized", "is_meta", "is_leaf",
          "local", "cut_dim", "range", "_whole", "__hash__", "ndimension"}  # fmt: skip


def _attribute(getter: Any) -> str:
    """The name of the attribute whose getter this is."""
    owner = getattr(getter, "__self__", None)
    return getattr(owner, "__name__", "")


def _plain(value: Any) -> Any:
    if isinstance(value, CutScores):
        return value.whole()
    if isinstance(value, list | tuple) and any(isinstance(each, CutScores) for each in value):
        return type(value)(_plain(each) for each in value)
    return value


def _again(scores: CutScores, local: Tensor, dim: int | None = None) -> CutScores:
    return CutScores(local, scores.cut_dim if dim is None else dim, scores.range)


def _same(func: Any, scores: CutScores, rest: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Element by element, with nothing but numbers beside."""
    if any(isinstance(each, Tensor) and each.dim() for each in (*rest, *given.values())):
        return NotImplemented
    return _again(scores, func(scores.local, *rest, **given))


def _moved(func: Any, scores: CutScores, rest: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """A view: where the dimension of classes goes is seen on a tensor without memory."""
    probe = torch.empty(scores.shape, device="meta")
    stride = probe.stride(scores.cut_dim)
    try:
        seen = func(probe, *rest, **given)
    except (RuntimeError, NotImplementedError):
        return NotImplemented
    if (
        not isinstance(seen, Tensor)
        or seen.untyped_storage()._cdata != probe.untyped_storage()._cdata
    ):
        return NotImplemented
    found = [
        dim
        for dim, number in enumerate(seen.shape)
        if number == scores.range.classes and seen.stride(dim) == stride
    ]
    if len(found) != 1 or seen.numel() * probe.numel() == 0:
        return NotImplemented
    if func.__name__ in ("view", "reshape", "flatten", "view_as", "reshape_as", "unflatten"):
        size = list(seen.shape)
        size[found[0]] = scores.local.shape[scores.cut_dim]
        return _again(scores, scores.local.reshape(size), found[0])
    return _again(scores, func(scores.local, *rest, **given), found[0])


def _indexed(func: Any, scores: CutScores, rest: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Rows: by a mask or by integers over dimensions before that of classes, or by slices."""
    index = rest[0]
    if isinstance(index, Tensor):
        covered = index.dim() if index.dtype == torch.bool else 1
        if covered > scores.cut_dim:
            return NotImplemented
        local = scores.local[index]
        return _again(scores, local, local.dim() - (scores.local.dim() - scores.cut_dim))
    if isinstance(index, tuple) and any(isinstance(each, Tensor | list) for each in index):
        return NotImplemented
    return _moved(func, scores, rest, given)


def _rows(scores: CutScores, dim: int) -> Tensor | None:
    """The part as [n, my classes], if classes lie along `dim`."""
    if dim % scores.dim() != scores.cut_dim:
        return None
    local = scores.local.movedim(scores.cut_dim, -1)
    return local.reshape(math.prod(local.shape[:-1]), local.shape[-1])


def _class_dim(scores: CutScores) -> int:
    return 0 if scores.dim() == 1 else 1


def _cross_entropy(func: Any, scores: CutScores, rest: Any, given: dict[str, Any]) -> Any:
    names = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction")
    asked = {**dict(zip((*names, "label_smoothing"), rest, strict=False)), **given}
    target = asked["target"]
    rows = _rows(scores, _class_dim(scores))
    old = (asked.get("weight"), asked.get("size_average"), asked.get("reduce"))
    if rows is None or target.is_floating_point() or any(each is not None for each in old):
        return NotImplemented
    ignored = target == asked.get("ignore_index", -100)
    labels = target.masked_fill(ignored, -1).reshape(-1)
    if rows.shape[0] != labels.shape[0]:
        return NotImplemented  # torch says what is wrong
    _check(target, ignored, scores.range)
    smoothing = float(asked.get("label_smoothing", 0.0))
    losses = CrossEntropyRows.apply(rows, labels, smoothing, scores.range)  # type: ignore[no-untyped-call]
    return _reduced(losses, ignored, target, asked.get("reduction", "mean"))


def _nll(func: Any, scores: CutScores, rest: Any, given: dict[str, Any]) -> Any:
    names = ("target", "weight", "size_average", "ignore_index", "reduce", "reduction")
    asked = {**dict(zip(names, rest, strict=False)), **given}
    target = asked["target"]
    rows = _rows(scores, _class_dim(scores))
    old = (asked.get("weight"), asked.get("size_average"), asked.get("reduce"))
    if rows is None or any(each is not None for each in old):
        return NotImplemented
    ignored = target == asked.get("ignore_index", -100)
    labels = target.masked_fill(ignored, -1).reshape(-1)
    if rows.shape[0] != labels.shape[0]:
        return NotImplemented
    _check(target, ignored, scores.range)
    losses = -_picked(rows, labels, scores.range)
    return _reduced(losses, ignored, target, asked.get("reduction", "mean"))


def _check(target: Tensor, ignored: Tensor, mine: Range) -> None:
    """As torch does on the CPU: IndexError for a label that is no class."""
    wrong = ((target < 0) | (target >= mine.classes)) & ~ignored
    if target.device.type == "cpu" and bool(wrong.any()):
        raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")


def _picked(rows: Tensor, labels: Tensor, mine: Range) -> Tensor:
    """Of each row the element of its label, 0 for a negative one; summed over the ranks."""
    here, column = _own_columns(labels, mine)
    return leave(rows.gather(1, column).squeeze(1).masked_fill(~here, 0.0), mine.group)


def _reduced(losses: Tensor, ignored: Tensor, target: Tensor, reduction: str) -> Any:
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / (~ignored).sum()
    return losses.reshape(target.shape) if reduction == "none" else NotImplemented


def _log_softmax(func: Any, scores: CutScores, rest: Any, given: dict[str, Any]) -> Any:
    dim = given.get("dim", rest[0] if rest else None)
    if not isinstance(dim, int):
        return NotImplemented
    dtype = given.get("dtype", next((each for each in rest if isinstance(each, torch.dtype)), None))
    rows = _rows(scores, dim)
    if rows is None:
        return NotImplemented
    rows = rows if dtype is None else rows.to(dtype)
    result = LogSoftmaxPart.apply(rows, scores.range)  # type: ignore[no-untyped-call]
    moved = scores.local.movedim(scores.cut_dim, -1)
    return _again(scores, result.reshape(moved.shape).movedim(-1, scores.cut_dim))


def _gathered(func: Any, scores: CutScores, rest: Any, given: dict[str, Any]) -> Any:
    """``scores.gather(-1, labels.unsqueeze(-1))``: the scores of the labels."""
    dim, index = (*rest, *given.values())[:2] if len(rest) + len(given) == 2 else (None, None)
    if not isinstance(dim, int) or not isinstance(index, Tensor) or index.shape[dim] != 1:
        return NotImplemented
    rows = _rows(scores, dim)
    if rows is None or index.numel() != rows.shape[0]:
        return NotImplemented
    labels = index.movedim(dim, -1).reshape(-1)
    picked = _picked(rows, labels, scores.range)
    return picked.reshape(index.movedim(dim, -1).shape).movedim(-1, dim % scores.dim())


_HANDLERS: dict[str, Callable[[Any, CutScores, Any, Any], Any]] = {
    **dict.fromkeys(("float", "double", "half", "bfloat16", "to", "clone", "contiguous", "mul",
                     "div", "true_divide", "__mul__", "__rmul__", "__truediv__", "add", "sub",
                     "__add__", "__radd__", "__sub__", "neg", "__neg__", "type"), _same),
    **dict.fromkeys(("view", "reshape", "flatten", "transpose", "permute", "movedim", "unsqueeze",
                     "squeeze", "narrow", "mT", "swapaxes", "select", "unflatten"), _moved),
    "__getitem__": _indexed,
    "cross_entropy": _cross_entropy,
    "nll_loss": _nll,
    "log_softmax": _log_softmax,
    "gather": _gathered,
}  # fmt: skip
assert F.cross_entropy.__name__ in _HANDLERS


class WithOutputs(Protocol):
    """What is used of a rewritten graph."""

    @property
    def outputs(self) -> tuple[Node, ...]: ...
    @property
    def cut_outputs(self) -> dict[int, int]: ...


def wrap(outputs: Sequence[Tensor], mine: WithOutputs, group: Group) -> list[Tensor]:
    """The graph's outputs with those that are cut as `CutScores`: for a loss function."""
    return [
        CutScores(value, *_range(mine, at, group)) if at in mine.cut_outputs else value
        for at, value in enumerate(outputs)
    ]


def gather_outputs(outputs: Sequence[Tensor], mine: WithOutputs, group: Group) -> list[Tensor]:
    """The graph's outputs, all whole: for metrics, predictions, comparison. Collective."""
    return [
        each.whole() if isinstance(each, CutScores) else each for each in wrap(outputs, mine, group)
    ]


def _range(mine: WithOutputs, at: int, group: Group) -> tuple[int, Range]:
    dim, split, _ = mine.outputs[at].meta["split"]
    return dim, Range(split.blocks[0].bounds, group)
