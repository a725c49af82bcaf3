"""Objectives: what is minimised, as a sum and a count, so that any split of a batch adds up.

    loss of the global batch = Σ sums ÷ Σ counts          over ranks, microbatches, batches

    objective = build_objective(component)
    total, count = objective(model(inputs), targets)
    (total / global_count).backward()

The sum is a 0-d tensor in float32, or float64 for float64 outputs; the count a 0-d float64
tensor without gradient. A batch of no rows gives a sum of 0 that still has a (zero) gradient.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import UserCodeError
from shoal.learn.shapes import (
    at_least_float32,
    check_between_0_and_1,
    classes_last,
    counted,
    labels,
    need_tensor,
    number,
    paired,
    per_example,
)
from shoal.recipe.component import is_import_path, thaw
from shoal.recipe.user import Named, call, check_options, load, unknown

# What torch ignores when nothing is to be ignored: its default, -100, would hide a wrong label.
_NO_LABEL = torch.iinfo(torch.int64).min


class Objective(Protocol):
    """Outputs and targets of some examples to (sum, count)."""

    def __call__(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Σ −log softmax(outputs)[target] over labels; the count is of labels not ignored.

    Layouts of outputs and targets: :mod:`shoal.learn.shapes`. With label smoothing ε the target
    is 1 − ε on the label and ε ÷ C on each of the C classes (Szegedy et al. 2015, section 7).
    Raises UserCodeError for shapes that do not fit, BadExample for labels that are no class.
    """

    label_smoothing: float = 0.0
    ignore_index: int | None = None

    def __call__(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        targets = need_targets(targets, "cross_entropy")
        scores = classes_last(at_least_float32(need_tensor(outputs, "cross_entropy")), targets)
        flat = labels(targets, scores.shape[1], self.ignore_index)
        total = F.cross_entropy(
            scores,
            flat,
            ignore_index=_NO_LABEL if self.ignore_index is None else self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        keep = counted(flat, self.ignore_index)
        count = number(flat.shape[0], flat) if keep is None else keep.sum(dtype=torch.float64)
        return total, count


@dataclass(frozen=True)
class MeanSquaredError:
    """Σ over examples of mean (output − target)²; the count is of examples."""

    def __call__(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        values = at_least_float32(need_tensor(outputs, "mse"))
        return per_example((values - paired(values, need_targets(targets, "mse"))).square())


@dataclass(frozen=True)
class Binary:
    """Σ over examples of mean −t·log σ(x) − (1 − t)·log(1 − σ(x)); the count is of examples.

    ``outputs`` x are logits, targets t from 0 to 1, integer or float.
    """

    def __call__(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        logits = at_least_float32(need_tensor(outputs, "binary"))
        wanted = paired(logits, need_targets(targets, "binary"))
        check_between_0_and_1(wanted)
        return per_example(F.binary_cross_entropy_with_logits(logits, wanted, reduction="none"))


@dataclass(frozen=True)
class UsersObjective:
    """A function of the user's: ``fn(outputs, targets, **options)``.

    It returns (sum, count), or one number: a mean. The count of a mean is ``weight_fn(targets)``,
    or else the first dimension of the targets, and its sum is mean × count. The function is not
    called where that count is 0, for such a mean is 0 ÷ 0.
    Raises UserCodeError for what it raises, and for what it returns if that is neither.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    weight_fn: Callable[[Any], Any] | None = None

    def __call__(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        weight = self._weight(targets)
        if float(weight) == 0:
            return _nothing(outputs)
        given = call(self.function, self.name, "objective", outputs, targets, **self.options)
        if isinstance(given, tuple | list) and len(given) == 2:
            total = self._number(given[0])
            return total, as_count(given[1] if self.weight_fn is None else weight, total)
        mean = self._number(given)
        count = as_count(weight, mean)
        return mean * count.to(mean.dtype), count

    def _weight(self, targets: Any) -> Any:
        if self.weight_fn is None or _rows(targets, self.name) == 0:
            return _rows(targets, self.name)
        return call(self.weight_fn, self.name, "weight_fn of objective", targets)

    def _number(self, value: Any) -> Tensor:
        if isinstance(value, Tensor) and value.numel() == 1:
            return at_least_float32(value.reshape(()))
        kind = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise UserCodeError(
            f"objective {self.name!r} returned {kind}",
            hint="It must return (sum, count), or the mean over the first dimension of the "
            "targets, as a tensor of one element.",
        )


def build_objective(component: Named) -> Objective:
    """The objective that a recipe names.

    Raises UsageError for a name, an import or options that cannot be.
    """
    options = thaw(component.options)
    if is_import_path(component.name):
        function = load(component.name, "objective")
        check_options(function, component.name, options, "objective", None, None)
        return UsersObjective(component.name, function, options)
    makers: dict[str, Callable[..., Objective]] = {
        "cross_entropy": CrossEntropy,
        "mse": MeanSquaredError,
        "binary": Binary,
    }
    if component.name not in makers:
        raise unknown(component.name, makers, "objective")
    check_options(makers[component.name], component.name, options, "objective")
    return makers[component.name](**options)


def as_count(count: Any, like: Tensor) -> Tensor:
    """A count that the user gave (a number or a tensor of one element) as a float64 0-d tensor."""
    if isinstance(count, Tensor) and count.numel() == 1:
        return count.detach().reshape(()).to(like.device, torch.float64)
    if isinstance(count, int | float):
        return number(count, like)
    kind = f"a tensor {list(count.shape)}" if isinstance(count, Tensor) else repr(count)
    raise UserCodeError(
        f"a count is one number, given {kind}",
        hint="Give the number of examples or tokens that the sum is over.",
    )


def need_targets(targets: object, who: str) -> Tensor:
    """``targets`` if they are one tensor of [n, …]; UserCodeError otherwise."""
    if isinstance(targets, Tensor) and targets.dim() > 0:
        return targets
    raise UserCodeError(
        f"{who} needs targets in one tensor [n, …], given a {type(targets).__name__}",
        hint="Name an objective of your own that takes these targets.",
    )


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value made of lists, tuples, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)
    elif is_dataclass(value):
        for part in fields(value):
            yield from tensors(getattr(value, part.name))


def _rows(targets: Any, name: str) -> int:
    for tensor in tensors(targets):
        if tensor.dim():
            return tensor.shape[0]
    raise UserCodeError(f"objective {name!r}: the targets hold no tensor [n, …]")


def _nothing(outputs: Any) -> tuple[Tensor, Tensor]:
    """(0, 0), with a gradient of zeros for everything that the outputs came from."""
    zeros = [
        at_least_float32(each.reshape(-1)[:0]).sum()
        for each in tensors(outputs)
        if each.is_floating_point()
    ]
    total = sum(zeros[1:], zeros[0]) if zeros else torch.zeros(())
    return total, number(0, total)
