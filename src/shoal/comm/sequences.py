"""Collectives between whole values and parts of them along one dimension, with their gradients.

    scatter_sum    forward: sum, my part     backward: parts together         partial sums → parts
    collect        forward: parts together   backward: sum, my part           parts → used by parts
    scatter        forward: my part          backward: parts together         whole → parts

    part = scatter_sum(linear(h, my_columns), 1, lengths, group)    # Korthikanti et al. 2022,
    whole = collect(layer_norm(part), 1, lengths, group)            # arXiv 2205.05198, section 4.2

`shoal.comm.differentiable.gather` is the fourth: parts → whole. ``lengths[rank]`` is the size of a
rank's part. A collective wants one shape of all ranks: of uneven parts what is sent is filled up
with zeros to the longest. Bytes count as "activation".
"""

from typing import Any

import torch
from torch import Tensor

from shoal.comm.groups import Group


def scatter_sum(value: Tensor, dim: int, lengths: list[int], group: Group) -> Tensor:
    """This rank's part of the sum over the group of each rank's `value`."""
    return _ScatterSum.apply(value, dim, lengths, group)  # type: ignore[no-any-return, no-untyped-call]


def collect(value: Tensor, dim: int, lengths: list[int], group: Group) -> Tensor:
    """Every rank's part together, on its way into work of which each rank does a part."""
    return _Collect.apply(value, dim, lengths, group)  # type: ignore[no-any-return, no-untyped-call]


def scatter(value: Tensor, dim: int, lengths: list[int], group: Group) -> Tensor:
    """This rank's part of a value that all ranks have whole."""
    return _Scatter.apply(value, dim, lengths, group)  # type: ignore[no-any-return, no-untyped-call]


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, lengths: list[int], group: Group) -> Tensor:
        ctx.how = dim, lengths, group
        return _sum_of_parts(value, dim, lengths, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _together(gradients[0], *ctx.how), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, lengths: list[int], group: Group) -> Tensor:
        ctx.how = dim, lengths, group
        return _together(value, dim, lengths, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _sum_of_parts(gradients[0], *ctx.how), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dim: int, lengths: list[int], group: Group) -> Tensor:
        ctx.how = dim, lengths, group
        start = sum(lengths[: group.rank])
        # A copy: a view would keep all of the whole value's memory.
        return value.narrow(dim, start, lengths[group.rank]).clone(
            memory_format=torch.contiguous_format
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _together(gradients[0], *ctx.how), None, None, None


def _together(value: Tensor, dim: int, lengths: list[int], group: Group) -> Tensor:
    """All-gather."""
    longest, mine = max(lengths), lengths[group.rank]
    sent = value.movedim(dim, 0)
    if longest != mine:
        sent = torch.cat([sent, sent.new_zeros(longest - mine, *sent.shape[1:])])
    parts = group.all_gather(sent.contiguous(), "activation")
    kept = [part[:length] for part, length in zip(parts, lengths, strict=True)]
    return torch.cat(kept).movedim(0, dim).contiguous()


def _sum_of_parts(value: Tensor, dim: int, lengths: list[int], group: Group) -> Tensor:
    """Reduce-scatter."""
    longest = max(lengths)
    rows = value.movedim(dim, 0)
    sent = rows.new_zeros(len(lengths), longest, *rows.shape[1:])
    for place, part in zip(sent, torch.split(rows, lengths), strict=True):
        place[: len(part)] = part
    result = torch.empty_like(sent[0])
    group.reduce_scatter(result, sent.flatten(0, 1), "activation")
    return result[: lengths[group.rank]].movedim(0, dim).contiguous()
