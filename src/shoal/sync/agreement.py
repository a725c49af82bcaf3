"""What every way of agreeing has in common."""

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor, nn

from shoal.comm import Group, Pending


class Replica(Protocol):
    """What an agreement needs of a replica: the parameters that get gradients."""

    @property
    def model(self) -> nn.Module: ...


class Accumulation(Protocol):
    """Of a replica with several backward passes a step: when is which gradient complete?

    A replica that has one says so as its attribute ``accumulation``.
    """

    def finishes(self, parameter: Tensor) -> bool:
        """Whether what is being added to this parameter's gradient now is the last of the step."""
        ...

    def tell(self, listener: Callable[[Iterable[Tensor]], None]) -> None:
        """Have `listener` called with parameters to whose gradients nothing is added any more."""


class Agreement(Protocol):
    """How replicas come to the same weights."""

    @property
    def hidden_s(self) -> float:
        """Seconds of communication so far during which this rank computed."""
        ...

    def attach(self, replica: Replica) -> None:
        """Put hooks on the replica's parameters, once, before the first step. Collective."""

    def share(self, vector: Tensor) -> Pending:
        """Start summing a small float64 vector over all ranks. Collective, once a step.

        A step of several microbatches has all but its last backward pass behind it then.
        """
        ...

    def agree(self, replica: Replica) -> None:
        """Finish what the step's gradients or weights need before the optimizer. Collective."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold besides, by ``name/key``."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from :meth:`state`."""


class Alone:
    """Nobody to agree with: one replica, perhaps on several ranks, or replicas that sum their
    gradients themselves.
    """

    hidden_s = 0.0

    def __init__(self, everyone: Group) -> None:
        self._everyone = everyone

    def attach(self, replica: Replica) -> None:
        return

    def share(self, vector: Tensor) -> Pending:
        return self._everyone.all_reduce_later(vector, "metric").on_host()

    def agree(self, replica: Replica) -> None:
        return

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        return
