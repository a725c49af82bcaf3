"""Which tensors of a model each stage holds, and taking the others out of it.

    holders = find_holders(model, segments)          # {"head.weight": {0, 3}, …}
    keep_only(model, {"block.0.weight", …})          # all others become None
    skeleton = skeleton_of(model)                    # before that: traced again later

A tied tensor goes by the first of its names. One that no stage uses (a layer that is never called)
stays beside the other tensors of its module, or with the first stage.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class HasState(Protocol):
    """A segment, as far as it is needed here."""

    @property
    def state(self) -> Mapping[str, str]: ...


def names_of(model: nn.Module) -> dict[str, str]:
    """{every qualified name of a parameter or buffer: the first name of the same tensor}."""
    first: dict[int, str] = {}
    found = {}
    for name, tensor in _all(model):
        found[name] = first.setdefault(id(tensor), name)
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by all of its names."""
    return dict(_all(model))


def _all(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def find_holders(model: nn.Module, stages: Sequence[Iterable[HasState]]) -> dict[str, set[int]]:
    """{first name of each tensor: the stages that hold it}, for the segments of each stage."""
    names = names_of(model)
    holders: defaultdict[str, set[int]] = defaultdict(set)
    for stage, segments in enumerate(stages):
        for segment in segments:
            for path in segment.state.values():
                holders[names[path]].add(stage)
    beside: defaultdict[str, set[int]] = defaultdict(set)
    for name, stages_of_it in holders.items():
        beside[name.rpartition(".")[0]] |= stages_of_it
    for name in set(names.values()) - holders.keys():
        holders[name] = {min(beside.get(name.rpartition(".")[0], {0}))}
    return dict(holders)


def keep_only(model: nn.Module, kept: set[str]) -> None:
    """Take every parameter and buffer out of `model` that is not one of those `kept`."""
    stay = {id(tensor) for name, tensor in _all(model) if name in kept}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is not None and id(tensor) not in stay:
                    place[name] = None


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters take no memory, to be traced after `keep_only`.

    Its buffers are the model's own: the trace does not change them, and free values (masks) are
    computed from them on every stage.
    """
    stands_for: dict[int, object] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in stands_for:
                stands_for[id(parameter)] = _hollow(parameter)
        for buffer in module._buffers.values():
            if buffer is not None:
                stands_for[id(buffer)] = buffer
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # copy.deepcopy refuses these
                stands_for[id(value)] = value.detach()
    return copy.deepcopy(model, stands_for)


def _hollow(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape that is one number in memory (where its strides allow)."""
    with torch.no_grad():
        pairs = parameter.shape[-1:] == (2,)  # of real numbers may become complex ones: a view
        if parameter.is_contiguous() and not pairs:
            tensor = parameter.new_zeros(()).expand(parameter.shape)
        else:
            tensor = torch.empty_like(parameter)  # channels last: strides are part of a trace
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)
