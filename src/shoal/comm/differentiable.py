"""Collectives that a gradient passes through: between what every rank has whole and its own part.

    enter    forward: as it is           backward: sum over the group       whole → used by parts
    leave    forward: sum over the group backward: as it is                 partial sums → whole
    gather   forward: parts together     backward: this rank's part         parts → whole

    h = relu(linear(enter(x, group), my_rows))          # Megatron's f and g (Shoeybi et al. 2019,
    y = leave(linear(h, my_columns), group) + bias      # arXiv 1909.08053, section 3)

A value that is whole is the same on every rank, and so is its gradient. Bytes count as
"activation".
"""

from typing import Any

import torch
from torch import Tensor

from shoal.comm.groups import Group


def enter(value: Tensor, group: Group) -> Tensor:
    """`value`, whole, on its way into work of which each rank does a part."""
    if group.size == 1:
        return value
    return _Enter.apply(value, group)  # type: ignore[no-any-return, no-untyped-call]


def leave(value: Tensor, group: Group) -> Tensor:
    """The sum over the group of each rank's `value`."""
    if group.size == 1:
        return value
    return _Leave.apply(value, group)  # type: ignore[no-any-return, no-untyped-call]


def gather(value: Tensor, dim: int, lengths: list[int], group: Group) -> Tensor:
    """Every rank's `value` one after another along `dim`; ``lengths[rank]`` is its size there."""
    if group.size == 1:
        return value
    return _Gather.apply(value, dim, lengths, group)  # type: ignore[no-any-return, no-untyped-call]


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(_own(gradients[0]), "activation"), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        return group.all_reduce(_own(value), "activation")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, lengths: list[int], group: Group) -> Tensor:
        ctx.dim, ctx.length = dim, lengths[group.rank]
        ctx.start = sum(lengths[: group.rank])
        longest = max(lengths)
        sent = value.movedim(dim, 0)
        if longest != ctx.length:  # a collective wants one shape of all ranks
            sent = torch.cat([sent, sent.new_zeros(longest - ctx.length, *sent.shape[1:])])
        parts = group.all_gather(sent.contiguous(), "activation")
        kept = [part[:length] for part, length in zip(parts, lengths, strict=True)]
        return torch.cat(kept).movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return gradients[0].narrow(ctx.dim, ctx.start, ctx.length), None, None, None


def _own(value: Tensor) -> Tensor:
    """Memory that may be summed into: a gradient or an output can be somebody else's as well."""
    return value.clone(memory_format=torch.contiguous_format)
