"""The bytes that a rank keeps between steps, by what they are; and which of them all ranks keep.

    found = persistent(holding, optimizer, layout)
    found.parameters, found.optimizer, found.replicated      # 1048576, 2097152, {"scale": 4, …}

A storage counts once, however many tensors lie in it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.layout import Part


@dataclass(frozen=True)
class Persistent:
    """Bytes of the storages of parameters, gradients, optimizer state and buffers.

    ``replicated``: of these the tensors that every rank keeps whole, by name; ``padding``: what
    uneven rows add to a rank's storages.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    replicated: Mapping[str, int]
    padding: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def persistent(
    running: nn.Module,
    holding: nn.Module,
    optimizer: torch.optim.Optimizer,
    layout: Mapping[str, Part],
) -> Persistent:
    """What this rank keeps. ``running``: the module that computes, ``holding`` what is updated."""
    names = {p: name for name, p in holding.named_parameters()}
    pieces = dict(holding.named_parameters())
    # Where a parameter has no memory between steps, its rows are in `holding` only.
    own = {n: local_of(p if _is_here(p) else pieces[n]) for n, p in running.named_parameters()}
    plain = list(own.values())
    parameters = _bytes([*plain, *holding.parameters()])
    gradients = [p.grad for p in [*holding.parameters(), *running.parameters()]]
    state = {
        f"{names[p]}/{key}": value  # type: ignore[index]
        for p, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }
    held = own | {f"optimizer: {name}": value for name, value in state.items()}
    held |= dict(running.named_buffers())
    kept = sum(p.untyped_storage().nbytes() for p in _once(plain))
    needed = sum(p.numel() * p.element_size() for p in plain)
    return Persistent(
        parameters=parameters,
        gradients=_bytes(local_of(g) for g in gradients if g is not None),
        optimizer=_bytes(state.values()),
        buffers=_bytes(running.buffers()),
        replicated={
            name: tensor.numel() * tensor.element_size()
            for name, tensor in held.items()
            if _is_whole(name, tensor, layout)
        },
        padding=kept - needed,
    )


def local_of(tensor: Tensor) -> Tensor:
    """The plain tensor of a distributed one; others as they are."""
    return getattr(tensor, "_local_tensor", tensor).detach()


def _is_whole(name: str, tensor: Tensor, layout: Mapping[str, Part]) -> bool:
    """Whether it is whole on this rank: as large as the model's, or not cut like a parameter."""
    owner = name.removeprefix("optimizer: ")
    part = layout[owner.rpartition("/")[0] if "/" in owner else owner]
    return tuple(tensor.shape) == part.global_shape or tuple(tensor.shape) != part.shape


def _is_here(parameter: nn.Parameter) -> bool:
    local = local_of(parameter)
    return not local.numel() or local.untyped_storage().nbytes() > 0


def _once(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One tensor of each storage."""
    found = {t.untyped_storage().data_ptr(): t for t in tensors if t.untyped_storage().nbytes()}
    return list(found.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in _once(tensors))
