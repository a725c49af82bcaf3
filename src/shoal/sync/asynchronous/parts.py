"""Which rank owns which tensor, and how an owner's part of weights and gradients lies in a letter.

    weights     [ w0 | w1 | … | buffers ]
    gradient    [ g0 | g1 | … | changes of buffers | used, used, … ]

    deal({"fc.weight": 800, "fc.bias": 10}, owners=2)      # {"fc.weight": 0, "fc.bias": 1}

Tensors are owned whole: any of torch's optimizers may update them. Buffers that a forward pass
changes (running statistics, counts of batches) travel as well: a worker begins with the version's
and sends what its batch has changed; their owner adds the mean of the changes. Floating-point
buffers and single integers can change so; other buffers are taken to be constant.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shoal.errors import Refused
from shoal.sync.bucket import view_in


def deal(sizes: Mapping[str, int], owners: int) -> dict[str, int]:
    """The owner of each tensor by name: the largest first, each to who has least."""
    load = [0] * owners
    owned = {}
    for name in sorted(sizes, key=lambda each: -sizes[each]):
        owner = load.index(min(load))
        owned[name] = owner
        load[owner] += sizes[name]
    return {name: owned[name] for name in sizes}


def kept_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: each for name, each in state.items() if seen.setdefault(id(each), name) == name}


def dtype_of(model: nn.Module) -> torch.dtype:
    """The one type of all parameters. Raises `Refused` where there are several."""
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(kinds) != 1:
        raise Refused(
            f"async sends parameters of one type, and these are {sorted(map(str, kinds))}",
            hint="Give the model parameters of one type, or use another strategy: dp2.",
        )
    return kinds.pop()


class Part:
    """Some tensors of a model, and where each lies in a letter."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.parameters: list[Tensor] = [
            each for each in tensors.values() if isinstance(each, nn.Parameter)
        ]
        self.buffers = [each for each in tensors.values() if _changes(each)]
        sizes = [each.numel() for each in (*self.parameters, *self.buffers)]
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self.size = self._starts[-1]
        self.weights_size = self._starts[len(self.parameters)]

    def of_parameters(self, flat: Tensor) -> list[Tensor]:
        """The place in `flat` of each parameter, with its shape and strides."""
        pairs = zip(self.parameters, self._starts, strict=False)
        return [view_in(flat, start, each) for each, start in pairs]

    def of_buffers(self, flat: Tensor) -> list[Tensor]:
        starts = self._starts[len(self.parameters) :]
        return [
            flat[start : start + each.numel()].view(each.shape)
            for each, start in zip(self.buffers, starts, strict=False)
        ]

    @torch.no_grad()
    def load(self, flat: Tensor) -> None:
        """Give the tensors the values of a letter with weights."""
        if self.parameters:
            torch._foreach_copy_(self.parameters, self.of_parameters(flat))
        for buffer, value in zip(self.buffers, self.of_buffers(flat), strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def weights(self) -> Tensor:
        """The tensors' values, as a letter."""
        flat = torch.empty(self.size, dtype=self.dtype)
        if self.parameters:
            torch._foreach_copy_(self.of_parameters(flat), self.parameters)
        _copy(self.of_buffers(flat), self.buffers)
        return flat

    @torch.no_grad()
    def gradient(self, begun_with: Tensor) -> Tensor:
        """The gradients that are there, and what has become of the buffers, as a letter."""
        flat = torch.empty(self.size + len(self.parameters), dtype=self.dtype)
        used = flat[self.size :].fill_(1.0)
        places, there = [], []
        for number, view in enumerate(self.of_parameters(flat)):
            gradient = self.parameters[number].grad
            if gradient is None:
                view.zero_()
                used[number] = 0.0
            else:
                places.append(view)
                there.append(gradient)
        if there:
            torch._foreach_copy_(places, there)
        after = torch.empty(self.size - self.weights_size, dtype=self.dtype)
        self._changes_into(flat[self.weights_size : self.size], begun_with, after)
        return flat

    def _changes_into(self, flat: Tensor, begun_with: Tensor, after: Tensor) -> None:
        start = 0
        for buffer in self.buffers:
            after[start : start + buffer.numel()].copy_(buffer.reshape(-1))
            start += buffer.numel()
        before = begun_with[self.weights_size :]
        # An infinity that stays has not changed.
        flat.copy_(torch.where(after == before, torch.zeros_like(after), after - before))


def _changes(tensor: Tensor) -> bool:
    """Whether a buffer may change in a forward pass."""
    if isinstance(tensor, nn.Parameter):
        return False
    return tensor.is_floating_point() or (tensor.dim() == 0 and not tensor.is_complex())


def _copy(places: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for place, value in zip(places, values, strict=True):
        place.copy_(value)
