"""Parameters whose gradients travel together, in one flat tensor.

    flat   [ gradient of the last layer | of the one before | … | used, used, … ]

The tail counts, for each parameter, the ranks on which the step has used it: one that no rank has
used gets no gradient, as on one device, and no further collective is needed to know.

    buckets = cut(parameters, max_bytes=8 << 20)      # last parameters first: as gradients arrive
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn


class Sent(Protocol):
    """A sum that is under way."""

    @property
    def began(self) -> float: ...
    @property
    def ended(self) -> float | None: ...

    def wait(self) -> object: ...


class Bucket:
    """Some parameters of one type on one device, and what the step in hand has of them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.arrived: set[int] = set()  # ids of parameters with a gradient
        self.complete: set[int] = set()  # of those to whose gradient nothing is added any more
        self.pending: Sent | None = None
        elements = sum(parameter.numel() for parameter in parameters)
        self.flat = torch.zeros(
            elements + len(parameters), dtype=parameters[0].dtype, device=parameters[0].device
        )
        self.used = self.flat[elements:]
        self._views, start = [], 0
        for parameter in parameters:
            self._views.append(view_in(self.flat, start, parameter))
            start += parameter.numel()

    def gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter and where its gradient lies in `flat`."""
        return zip(self.parameters, self._views, strict=True)

    @property
    def is_full(self) -> bool:
        """Whether every gradient is there and complete."""
        return len(self.complete) == len(self.parameters)

    def fill(self) -> None:
        """Bring the gradients that are there into `flat`, and let the parameters' lie there."""
        views, gradients = [], []
        self.used.fill_(1.0)
        for place, (parameter, view) in enumerate(zip(self.parameters, self._views, strict=True)):
            if id(parameter) not in self.arrived or parameter.grad is None:
                view.zero_()
                self.used[place] = 0.0
            else:
                views.append(view)
                gradients.append(parameter.grad)
                parameter.grad = view
        if views:
            torch._foreach_copy_(views, gradients)

    def settle(self) -> None:
        """Once `flat` is the sum: give gradients to parameters that only other ranks have used."""
        if len(self.arrived) < len(self.parameters):
            used = self.used.tolist()
            for parameter, view, ranks in zip(self.parameters, self._views, used, strict=True):
                parameter.grad = view if ranks else None
        self.arrived.clear()
        self.complete.clear()
        self.pending = None


def cut(parameters: Iterable[nn.Parameter], max_bytes: int) -> list[Bucket]:
    """Buckets of at most `max_bytes` (or one parameter), in the order of `parameters`."""
    buckets: list[list[nn.Parameter]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    room: dict[tuple[torch.dtype, torch.device], int] = {}
    for parameter in parameters:
        kind = parameter.dtype, parameter.device
        size = parameter.numel() * parameter.element_size()
        if kind not in room or size > room[kind]:
            open_buckets[kind] = []
            buckets.append(open_buckets[kind])
            room[kind] = max_bytes
        open_buckets[kind].append(parameter)
        room[kind] -= size
    return [Bucket(each) for each in buckets]


def view_in(flat: Tensor, start: int, parameter: Tensor) -> Tensor:
    """The parameter's place in `flat`, with its strides: optimizers are slow over others."""
    shape, strides = parameter.shape, parameter.stride()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if parameter.numel() and extent == parameter.numel():  # dense, in whatever order
        return flat.as_strided(shape, strides, start)
    return flat[start : start + parameter.numel()].view(shape)
