"""Batch norm over groups whose rows lie on several ranks, forward and backward.

Parts of a group are combined by the rule of Chan, Golub & LeVeque (1979): with part means m_i,
counts n_i, sums of squared deviations M_i,

    mean = Σ n_i m_i / n,    M = Σ M_i + Σ n_i (m_i − mean)²

which does not cancel where E[x²] − E[x]² does. Backward, with x̂ the normalised input and sums over
the whole group,

    d input = w / √(var + ε) · (dy − Σdy / n − x̂ · Σ(dy·x̂) / n)

torch.nn.SyncBatchNorm refuses tensors on the CPU and knows one group only; hence this one, on the
collectives of `comm/`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from shoal.parallel.batch_groups import BatchGroups
from shoal.parallel.single_value import refuse_single


class BatchNormAcross(torch.autograd.Function):
    """``(input, weight, bias, eps, groups) → output, means, unbiased variances, counts``.

    The last three are of each group, ``[groups, C]`` and ``[groups, 1]``, without a gradient.
    Collective, forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        groups: BatchGroups,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        spans = groups.spans_of(input.shape[0])
        mean, squares, count = _combine(_parts(input, groups), groups)
        for number, values in enumerate(count.flatten().tolist()):
            if values == 1:
                raise refuse_single(number)
        variance = squares / count.clamp(min=1)
        output = torch.empty_like(input)
        for span in spans:
            output[span.rows] = functional.batch_norm(
                input[span.rows], mean[span.group], variance[span.group], weight, bias, eps=eps
            )
        ctx.save_for_backward(input, weight, mean, (variance + eps).rsqrt(), count)
        ctx.group, ctx.spans, ctx.stands_in = groups.group, spans, groups.stands_in
        unbiased = squares / (count - 1).clamp(min=1)
        ctx.mark_non_differentiable(mean, unbiased, count)
        return output, mean, unbiased, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, inverse_std, count = ctx.saved_tensors
        dy = gradients[0]
        sums = _sums(dy, input, mean, inverse_std, ctx.spans)
        grad_weight, grad_bias = sums.sum(1)
        slopes, shifts = ctx.group.all_reduce(sums.clone(), "activation") / count.clamp(min=1)
        scale = inverse_std if weight is None else inverse_std * weight.to(inverse_std.dtype)
        # Rows without weight are no part of their group: it does not depend on them.
        result = torch.zeros_like(input) if ctx.stands_in else torch.empty_like(input)
        for span in () if ctx.stands_in else ctx.spans:
            rows, g = input[span.rows], span.group
            centred = dy[span.rows].to(mean.dtype) - _channels(shifts[g], rows)
            curved = _normal(rows, mean[g], inverse_std[g]) * _channels(slopes[g], rows)
            result[span.rows] = ((centred - curved) * _channels(scale[g], rows)).to(input.dtype)
        if weight is None:
            return result, None, None, None, None
        return result, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


def _sums(dy: Tensor, input: Tensor, mean: Tensor, inverse_std: Tensor, spans: Any) -> Tensor:
    """Σdy·x̂ and Σdy over the local rows of each group: ``[2, groups, C]``."""
    sums = mean.new_zeros(2, *mean.shape)
    axes = [axis for axis in range(input.dim()) if axis != 1]
    for span in spans:
        part = dy[span.rows].to(mean.dtype)
        normal = _normal(input[span.rows], mean[span.group], inverse_std[span.group])
        sums[0, span.group] = (part * normal).sum(axes)
        sums[1, span.group] = part.sum(axes)
    return sums


def _parts(input: Tensor, groups: BatchGroups) -> Tensor:
    """Local mean, sum of squared deviations and count: ``[groups, 2·C + 1]``."""
    channels = input.shape[1]
    kind = torch.promote_types(input.dtype, torch.float32)
    parts = input.new_zeros(groups.count, 2 * channels + 1, dtype=kind)
    axes = [axis for axis in range(input.dim()) if axis != 1]
    for span in () if groups.stands_in else groups.spans_of(input.shape[0]):
        rows = input[span.rows].to(kind)
        variance, mean = torch.var_mean(rows, axes, correction=0)
        count = rows.numel() // channels
        parts[span.group, :channels] = mean
        parts[span.group, channels:-1] = variance * count
        parts[span.group, -1] = count
    return parts


def _combine(parts: Tensor, groups: BatchGroups) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, sum of squared deviations, count ``[groups, C | C | 1]`` over all ranks."""
    channels = (parts.shape[1] - 1) // 2
    gathered = groups.group.all_gather(parts, "activation")
    means, squares, counts = gathered.tensor_split((channels, 2 * channels), dim=2)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count.clamp(min=1)
    return mean, squares.sum(0) + (counts * (means - mean).square()).sum(0), count


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *(1 for _ in range(like.dim() - 2)))


def _normal(rows: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    return (rows.to(mean.dtype) - _channels(mean, rows)) * _channels(inverse_std, rows)
