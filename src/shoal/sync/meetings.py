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
from shoal.strategy import Compress
from shoal.sync.average import average


@dataclass(frozen=True)
class Setting:
    """What replicas that meet are made of, on this rank.

    ``between``: the ranks that hold the same part of each replica. ``model``: the parameters and
    buffers that this rank keeps of its replica, by name (`Replica.holding`). ``examples(step)``:
    how many examples each replica has of a step, in the order of ``between``; the same on all.
    ``compress``: how what they send is made smaller. ``place``: this rank's in its replica.
    """

    between: Group
    model: nn.Module
    optimizer: torch.optim.Optimizer
    total_steps: int
    examples: Callable[[int], Sequence[int]]
    compress: Compress | None = None
    place: int = 0

    def share(self, first: int, last: int) -> float:
        """This replica's share of the examples of the steps from `first` to `last`, both included.

        Of all replicas together they add up to 1.
        """
        of_each = [0] * self.between.size
        for step in range(first, last + 1):
            for replica, count in enumerate(self.examples(step)):
                of_each[replica] += count
        return of_each[self.between.rank] / sum(of_each)

    def is_last(self, step: int) -> bool:
        """Whether the run ends with this step."""
        return step + 1 == self.total_steps


class Meetings(Protocol):
    """How replicas with weights of their own come together."""

    @property
    def hidden_s(self) -> float:
        """Seconds of communication so far during which this rank computed."""
        ...

    def gradients(self, step: int, count: float) -> bool:
        """Before the update: what the gradients need that are agreed on in this step.

        ``.grad`` of what this rank keeps are means over this replica's ``count``, as its objective
        counts; a replica without examples has none, and 0. Returns whether they are all replicas'
        now: then also one without examples updates. Collective over ``between``.
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

    def gradients(self, step: int, count: float) -> bool:
        return False

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
    """What averages are of, by name: trained parameters and saved floating-point buffers.

    Tied ones once. Frozen parameters are equal already, and a mean of three equal numbers is not
    always the number.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        changes = tensor.requires_grad if isinstance(tensor, nn.Parameter) else True
        if changes and tensor.is_floating_point():
            found[name] = tensor
    return found


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class MeanOfReplicas:
    """The weights that stand for all replicas are their mean."""

    def __init__(self, setting: Setting) -> None:
        self._floating = floating(setting.model)
        self._group = setting.between
        self.are_equal = False  # just after a meeting: the mean would only add rounding

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, the model has the mean. Collective."""
        if self.are_equal or self._group.size == 1:
            yield
            return
        own = list(self._floating.values())
        means = [tensor.detach().clone() for tensor in own]
        average(means, 1 / self._group.size, self._group)
        with exchanged(own, means):
            yield
