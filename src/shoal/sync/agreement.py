"""What every way of agreeing has in common."""

from typing import Protocol

from torch import Tensor, nn

from shoal.comm import Pending


class Replica(Protocol):
    """What an agreement needs of a replica: its model."""

    @property
    def model(self) -> nn.Module: ...


class Agreement(Protocol):
    """How replicas come to the same weights."""

    @property
    def hidden_s(self) -> float:
        """Seconds of communication so far during which this rank computed."""
        ...

    def attach(self, replica: Replica) -> None:
        """Put hooks on the replica's parameters, once, before the first step. Collective."""

    def share(self, vector: Tensor) -> Pending:
        """Start summing a small float64 vector over the replicas. Collective, once a step."""
        ...

    def agree(self, replica: Replica) -> None:
        """Finish what the step's gradients or weights need before the optimizer. Collective."""


class Alone:
    """One replica: there is nobody to agree with."""

    hidden_s = 0.0

    def attach(self, replica: Replica) -> None:
        return

    def share(self, vector: Tensor) -> Pending:
        return Pending(vector).on_host()

    def agree(self, replica: Replica) -> None:
        return
