"""What every way of agreeing has in common."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn


class Replica(Protocol):
    """What an agreement needs of a replica: its model, and a place for hooks around it."""

    @property
    def model(self) -> nn.Module: ...
    def wrap(self, wrapper: Callable[[nn.Module], nn.Module]) -> None: ...


class Agreement(Protocol):
    """How replicas come to the same weights."""

    def attach(self, replica: Replica) -> None:
        """Put hooks around the replica, once, before the first step. Collective."""

    def share(self, vector: Tensor) -> Tensor:
        """Sum a small float64 vector over the replicas. Collective, once a step."""
        ...

    def agree(self, replica: Replica) -> None:
        """Finish what the step's gradients or weights need before the optimizer. Collective."""


class Alone:
    """One replica: there is nobody to agree with."""

    def attach(self, replica: Replica) -> None:
        return

    def share(self, vector: Tensor) -> Tensor:
        return vector

    def agree(self, replica: Replica) -> None:
        return
