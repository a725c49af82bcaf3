"""What replicas do that have weights of their own for a while: each updates its own, and they meet.

    replica 0   step  step  step  step ┐ meet ┌ step  step  …
    replica 1   step  step  step  step ┘      └ step  step  …

    meetings = build_meetings(agreement, setting)
    meetings.after(step)                 # after the update of step `step` on this rank
    with meetings.settled():             # the weights that stand for all replicas
        evaluate(…)

A replica that has no examples in a step does not update in it; what it says at a meeting weighs as
much as the examples that it has seen since the last one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shoal.comm import Group


@dataclass(frozen=True)
class Setting:
    """What replicas that meet are made of, on this rank.

    ``between``: the ranks that hold the same part of each replica. ``model``: the parameters and
    buffers that this rank keeps of its replica, by name (`Replica.holding`). ``examples(step)``:
    how many examples each replica has of a step, in the order of ``between``; the same on all.
    """

    between: Group
    model: nn.Module
    optimizer: torch.optim.Optimizer
    total_steps: int
    examples: Callable[[int], Sequence[int]]


class Meetings(Protocol):
    """How replicas with weights of their own come together."""

    hidden_s: float
    """Seconds of communication so far during which this rank computed."""

    def gradients(self, step: int, count: float) -> float:
        """Before the update: what the gradients need that are agreed on in this step.

        ``.grad`` are sums over this replica's examples ÷ ``count``, what its objective counted.
        Returns the count that they are per, then. Collective over ``between``.
        """
        ...

    def after(self, step: int) -> None:
        """After the update of step `step` (0-based). Collective over ``between``."""

    def settled(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model has the weights that stand for all replicas. Collective."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold besides, of this replica: ``fc.weight/sync.momentum``."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from :meth:`state`, cut as this rank's parameters are; empty at a first start."""


class Never:
    """`solo`: they never meet."""

    hidden_s = 0.0

    def gradients(self, step: int, count: float) -> float:
        return count

    def after(self, step: int) -> None:
        return

    def settled(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        return


@contextlib.contextmanager
def exchanged(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Inside, `tensors` have the values of `others`; afterwards their own again, bit for bit."""
    own = [tensor.detach().clone() for tensor in tensors]
    with torch.no_grad():
        for tensor, other in zip(tensors, others, strict=True):
            tensor.copy_(other)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, own, strict=True):
                tensor.copy_(before)


def floating(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name, tied ones once: what averages are of."""
    named: dict[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if tensor.is_floating_point()}
