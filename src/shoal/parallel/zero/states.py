"""What a rank keeps of a replica's states, as the training step sees it; `Whole` keeps all.

backward ▸ finish ─ take_gradients ─ (norm, clip, optimizer) ─ spread ▸ next forward
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from shoal.layout import Part


class States(Protocol):
    """Parameters and gradients between the backward pass and the next forward pass."""

    in_step: bool
    """Whether all ranks have to run every forward and backward pass together."""

    @property
    def holding(self) -> nn.Module:
        """The user's module with the plain tensors that this rank keeps and updates."""
        ...

    def layout(self, whole: dict[str, Part]) -> dict[str, Part]:
        """Which part of each tensor that is, where `whole` is what the rank held uncut."""
        ...

    def finish(self) -> None:
        """After a step's last backward pass, before replicas agree. Collective."""

    def take_gradients(self, factor: float) -> None:
        """Once replicas have agreed: give `holding` its gradients, times `factor`."""

    def norm(self) -> Tensor:
        """The 2-norm of the whole gradient, a 0-d tensor. Collective."""
        ...

    def spread(self) -> None:
        """After the optimizer's update: bring it to where the forward pass needs it. Collective."""


class Whole:
    """Nothing is cut."""

    in_step = False

    def __init__(self, model: nn.Module) -> None:
        self.holding = model

    def layout(self, whole: dict[str, Part]) -> dict[str, Part]:
        return whole

    def finish(self) -> None:
        return

    def take_gradients(self, factor: float) -> None:
        scale(self.holding, factor)

    def norm(self) -> Tensor:
        return norm_of(self.holding)

    def spread(self) -> None:
        return


def scale(module: nn.Module, factor: float) -> None:
    """Multiply the gradients that a module has, in place."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    if factor != 1.0 and gradients:
        torch._foreach_mul_(gradients, factor)


def norm_of(module: nn.Module) -> Tensor:
    """The 2-norm of the gradients that a module has, 0-d."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None and p.numel()]
    return torch.nn.utils.get_total_norm(gradients)
