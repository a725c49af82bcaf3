"""Metrics: shares of right answers, as exact sums and counts in float64.

    metric of a set = Σ sums ÷ Σ counts          every example (or token) counted once

    metrics = build_metrics(["accuracy", "top5"])
    right, count = metrics["accuracy"](outputs, targets)

``loss`` is not here: it is the objective's own (sum, count).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shoal.errors import UserCodeError
from shoal.learn.objectives import need_targets
from shoal.learn.shapes import (
    check_between_0_and_1,
    classes_last,
    counted,
    labels,
    need_tensor,
    number,
    per_example,
)
from shoal.recipe.user import unknown


class Metric(Protocol):
    """Outputs and targets of some examples to (sum, count), float64 0-d tensors."""

    def __call__(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class TopK:
    """How many labels are among the k highest scores; k is cut to the number of classes.

    Layouts as in :mod:`shoal.learn.shapes`. One logit an answer (outputs of the targets' shape,
    or with one last dimension of 1) is right where logit > 0 says what target ≥ 0.5 says; an
    example with several such answers counts once, with the share of them that is right.
    Raises UserCodeError for shapes that do not fit, BadExample for labels that are no class.
    """

    name: str
    k: int
    ignore_index: int | None = None

    @torch.no_grad()
    def __call__(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        outputs, targets = need_tensor(outputs, self.name), need_targets(targets, self.name)
        if outputs.shape == targets.shape or outputs.shape == (*targets.shape, 1):
            return self._one_logit(outputs.reshape(targets.shape), targets)
        scores = classes_last(outputs, targets)
        flat = labels(targets, scores.shape[1], self.ignore_index)
        highest = scores.topk(min(self.k, scores.shape[1]), dim=1).indices
        right = (highest == flat.unsqueeze(1)).any(1)
        keep = counted(flat, self.ignore_index)
        if keep is None:
            return right.sum(dtype=torch.float64), number(flat.shape[0], flat)
        return (right & keep).sum(dtype=torch.float64), keep.sum(dtype=torch.float64)

    def _one_logit(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.k > 1:
            raise UserCodeError(
                f"{self.name} needs a score for each class, given one logit an answer",
                hint="Take it out of evaluate.metrics.",
            )
        check_between_0_and_1(targets)
        return per_example(((logits > 0) == (targets >= 0.5)).double())


def build_metrics(names: Iterable[str], ignore_index: int | None = None) -> dict[str, Metric]:
    """The metrics of these names, in this order; ``loss`` is left out, as the objective gives it.

    ``ignore_index`` is the objective's: labels of that value count nowhere.
    Raises UsageError for a name that does not exist.
    """
    known = {"accuracy": 1, "top5": 5}
    metrics: dict[str, Metric] = {}
    for name in names:
        if name == "loss":
            continue
        if name not in known:
            raise unknown(name, [*known, "loss"], "metric")
        metrics[name] = TopK(name, known[name], ignore_index)
    return metrics
