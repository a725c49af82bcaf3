"""What outputs and targets look like: where the classes are, which targets count, what is legal.

    outputs               targets        read as
    [n, C]                [n]            one label an example
    [n, L, C]             [n, L]         one label a position, classes last
    [n, C, L]             [n, L]         the same in torch's layout, classes second
    [n, …] or [n, …, 1]   [n, …]         one number against one number (mse, binary)
    [n, C]                [n] integers   the label as a row of 0s and one 1 (mse, binary)

Values of targets are checked on the CPU alone: on an accelerator it would stop for every batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import BadExample, UserCodeError


def classes_last(outputs: Tensor, targets: Tensor) -> Tensor:
    """Scores [m, C] for the m = targets.numel() labels of ``targets``, in their order.

    Raises UserCodeError where neither layout fits, or both do (L = C): transposing the outputs
    in the model cannot then be told from not doing so.
    """
    shape, wanted = tuple(outputs.shape), tuple(targets.shape)
    last = len(shape) == len(wanted) + 1 and shape[:-1] == wanted
    second = len(shape) == len(wanted) + 1 and (shape[0], *shape[2:]) == wanted
    if last and second and len(shape) > 2:
        raise UserCodeError(
            f"outputs {_show(outputs)} for targets {_show(targets)}: classes may be second or last",
            hint="Flatten positions into the first dimension of both: [n·L, classes] and [n·L].",
        )
    if not (last or second) or not shape[-1 if last else 1]:
        raise UserCodeError(
            f"outputs {_show(outputs)} do not fit targets {_show(targets)}",
            hint="Class targets [n, …] need outputs [n, …, classes] or [n, classes, …].",
        )
    scores = outputs if last else outputs.movedim(1, -1)
    return scores.reshape(targets.numel(), scores.shape[-1])


def labels(targets: Tensor, classes: int, ignore_index: int | None) -> Tensor:
    """Targets as int64 [m], in order.

    Raises UserCodeError for targets that are not integers, BadExample (on the CPU) for one that
    is no class and not ``ignore_index``.
    """
    if targets.is_floating_point() or targets.is_complex():
        raise UserCodeError(
            f"targets are {targets.dtype}; classes are integers",
            hint="Give labels 0 to classes - 1, or use the objective mse or binary.",
        )
    flat = targets.reshape(-1).long()
    if can_look_at(flat):
        bad = (flat < 0) | (flat >= classes)
        if ignore_index is not None:
            bad &= flat != ignore_index
        if bad.any():
            raise _bad_label(targets, bad, classes)
    return flat


def counted(flat: Tensor, ignore_index: int | None) -> Tensor | None:
    """Which labels of [m] count, as booleans; None if all do."""
    return None if ignore_index is None else flat != ignore_index


def paired(outputs: Tensor, targets: Tensor) -> Tensor:
    """Targets in the outputs' shape and type, number against number.

    Integer labels [n] against outputs [n, C] with C > 1 become rows of 0s and one 1.
    Raises UserCodeError where the shapes do not fit: torch would stretch [n] over [n, 1] to [n, n].
    """
    if outputs.shape == targets.shape:
        return targets.to(outputs.dtype)
    if outputs.shape == (*targets.shape, 1):
        return targets.to(outputs.dtype).unsqueeze(-1)
    whole = not targets.is_floating_point()
    if whole and outputs.dim() == 2 and targets.shape == outputs.shape[:1]:
        flat = labels(targets, outputs.shape[1], None)
        return F.one_hot(flat, outputs.shape[1]).to(outputs.dtype)
    raise UserCodeError(
        f"outputs {_show(outputs)} do not fit targets {_show(targets)}",
        hint="They need the same shape, or whole numbers [n] as labels of outputs [n, classes].",
    )


def check_between_0_and_1(targets: Tensor) -> None:
    """Raise BadExample (on the CPU) for a binary target outside 0 to 1."""
    if not can_look_at(targets):
        return
    bad = ~((targets >= 0) & (targets <= 1))
    if bad.any():
        row, value = _first(targets, bad.reshape(-1))
        raise BadExample(
            f"target {value} in row {row} of the batch; a binary target is from 0 to 1",
            hint="Use the objective cross_entropy for more than two classes, mse for numbers.",
        )


def per_example(values: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over examples of the mean over an example's elements, number of examples) of [n, …]."""
    elements = math.prod(values.shape[1:])
    return values.sum() / max(1, elements), number(values.shape[0], values)


def number(value: float, like: Tensor) -> Tensor:
    """A float64 0-d tensor on the device of ``like``, made without waiting for it."""
    return torch.full((), float(value), dtype=torch.float64, device=like.device)


def at_least_float32(outputs: Tensor) -> Tensor:
    """float64 as it is, everything else as float32: a sum over a batch needs the digits."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def need_tensor(outputs: object, who: str) -> Tensor:
    """``outputs`` if they are one tensor of [n, …]; UserCodeError otherwise."""
    if isinstance(outputs, Tensor) and outputs.dim() > 0:
        return outputs
    kind = "a 0-d tensor" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
    raise UserCodeError(
        f"the model returned {kind}; {who} needs one tensor [n, …]",
        hint="Return a tensor, or name an objective of your own that takes what the model returns.",
    )


def can_look_at(tensor: Tensor) -> bool:
    """Whether values can be read at no cost: on the CPU, and a real tensor, not a traced one."""
    return (
        type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    )


def _bad_label(targets: Tensor, bad: Tensor, classes: int) -> BadExample:
    row, value = _first(targets, bad)
    hint = "Correct the label, or give the model more classes."
    if value < 0:
        hint = f"If {value:g} marks what does not count, say ignore_index: {value:g}."
    return BadExample(
        f"target {value:g} in row {row} of the batch; with {classes} classes it is 0 to "
        f"{classes - 1}",
        hint=hint,
    )


def _first(targets: Tensor, bad: Tensor) -> tuple[int, float]:
    at = int(bad.nonzero()[0])
    return at // max(1, math.prod(targets.shape[1:])), float(targets.reshape(-1)[at])


def _show(tensor: Tensor) -> str:
    return str(list(tensor.shape))
