"""Batch statistics over groups of examples of the *global* batch, wherever their rows are.

    global batch   0 1 2 3 | 4 5 6 7 | 8 9          normalize_over: 4 → groups 0, 1, 2
    rank 0         0 1 2 3   4                      group 1 lies on both ranks: its mean and
    rank 1                     5 6 7   8 9          variance are combined from both parts

Group g of a step normalises its own rows by its own mean and variance:

    y = (x − mean_g) / √(var_g + ε) · weight + bias

and the running statistics take one step per group, in the order of groups, on one device too.
``normalize_over: batch`` is one group, the whole batch. Parts of a group are combined by the rule
of Chan, Golub & LeVeque (1979): with part means m_i, counts n_i, sums of squared deviations M_i,

    mean = Σ n_i m_i / n,    M = Σ M_i + Σ n_i (m_i − mean)²

which does not cancel where E[x²] − E[x]² does. torch.nn.SyncBatchNorm refuses tensors on the CPU
and knows one group only; hence this one, on the collectives of `comm/`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from shoal.comm import Group
from shoal.errors import RunError


@dataclass(frozen=True)
class Span:
    """The rows of one group that are on this rank: ``rows`` of the local batch."""

    group: int
    rows: slice


@dataclass
class BatchGroups:
    """How the rows of the step in hand fall into groups; shared by all layers of a replica."""

    normalize_over: int | None  # None: the whole batch is one group
    group: Group
    count: int = 1
    spans: tuple[Span, ...] = ()
    crosses: bool = False
    recomputing: bool = False
    pending: list[tuple["GroupBatchNorm", Tensor, Tensor]] = field(default_factory=list)

    def begin(self, rows: Tensor, batch_examples: int, shares: list[tuple[int, int]]) -> None:
        """Set the groups of a step.

        ``rows``: positions of the local rows in the global batch (int64, ascending); ``shares``:
        every rank's (start, stop) of those positions.
        """
        size = self.normalize_over or max(1, batch_examples)
        self.count = max(1, -(-batch_examples // size))
        group_of_row = torch.div(rows, size, rounding_mode="floor")
        numbers, lengths = torch.unique_consecutive(group_of_row, return_counts=True)
        start, spans = 0, []
        for number, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
            spans.append(Span(number, slice(start, start + length)))
            start += length
        self.spans = tuple(spans)
        borders = [stop for _, stop in shares if 0 < stop < batch_examples]
        self.crosses = self.group.size > 1 and any(border % size for border in borders)
        self.pending.clear()

    @contextlib.contextmanager
    def recomputation(self) -> Iterator[None]:
        """Inside, statistics are used again and not counted again."""
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False

    def finish(self) -> None:
        """Bring running statistics up to date where groups lie whole on one rank.

        One small collective a step for all layers together; normalising itself needed none.
        """
        if not self.pending:
            return
        local = torch.cat([torch.stack((m, v)).flatten() for _, m, v in self.pending])
        # Every group is on exactly one rank, and zero on the others: the sum is exact.
        everywhere = self.group.all_reduce(local, "activation")
        start = 0
        for layer, mean, _ in self.pending:
            means, variances = everywhere[start : start + 2 * mean.numel()].view(2, *mean.shape)
            layer.track(means, variances)
            start += 2 * mean.numel()
        self.pending.clear()


class GroupBatchNorm(_BatchNorm):
    """Batch normalisation over `BatchGroups`; parameters and buffers are the original layer's."""

    groups: BatchGroups

    @classmethod
    def of(cls, layer: _BatchNorm, groups: BatchGroups) -> "GroupBatchNorm":
        """The same layer (same parameters, same buffers) with statistics over `groups`."""
        new = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, False)
        new.track_running_stats = layer.track_running_stats
        new._parameters = layer._parameters
        new._buffers = layer._buffers
        new.training = layer.training
        new.groups = groups
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs inputs [N, C, …], given {tuple(input.shape)}")

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training and self.running_mean is not None:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        if self.groups.crosses:
            return self._across(input)
        return self._within(input)

    def _within(self, input: Tensor) -> Tensor:
        """Every group lies whole on one rank: torch's own kernel on each group's rows."""
        outputs = []
        kind = torch.promote_types(input.dtype, torch.float32)
        means = input.new_zeros(self.groups.count, self.num_features, dtype=kind)
        variances = torch.zeros_like(means)
        for span in self.groups.spans:
            part = input[span.rows]
            _need_two(part, span.group)
            # A momentum of 1 leaves the group's own mean and unbiased variance in the rows.
            outputs.append(
                functional.batch_norm(
                    part,
                    means[span.group],
                    variances[span.group],
                    self.weight,
                    self.bias,
                    training=True,
                    momentum=1.0,
                    eps=self.eps,
                )
            )
        if self.training and self.running_mean is not None and not self.groups.recomputing:
            self.groups.pending.append((self, means, variances))
        return torch.cat(outputs) if outputs else _empty_like(input, self.weight, self.bias)

    def _across(self, input: Tensor) -> Tensor:
        """Some group lies on several ranks: combine the parts, here and in the backward pass."""
        output, means, variances = _Across.apply(
            input, self.weight, self.bias, self.eps, self.groups
        )
        if self.training and self.running_mean is not None and not self.groups.recomputing:
            self.track(means, variances)
        return output  # type: ignore[no-any-return]

    def track(self, means: Tensor, variances: Tensor) -> None:
        """One step of the running statistics per group, in the order of groups."""
        assert self.running_mean is not None and self.running_var is not None
        with torch.no_grad():
            for mean, variance in zip(means, variances, strict=True):
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
                factor = self.momentum
                if factor is None:  # a plain average over all groups so far
                    factor = 1.0 / float(self.num_batches_tracked)
                self.running_mean.mul_(1 - factor).add_(mean, alpha=factor)
                self.running_var.mul_(1 - factor).add_(variance, alpha=factor)


class _Across(torch.autograd.Function):
    """Batch norm whose groups lie on several ranks; returns output, means, unbiased variances."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        groups: BatchGroups,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = torch.promote_types(input.dtype, torch.float32)
        mean, squares, count = _combine(_parts(input, groups, kind), groups)
        for number, examples in enumerate(count.flatten().tolist()):
            if examples == 1:
                _refuse_single(number)
        variance = squares / count.clamp(min=1)
        output = torch.empty_like(input)
        for span in groups.spans:
            output[span.rows] = functional.batch_norm(
                input[span.rows], mean[span.group], variance[span.group], weight, bias, eps=eps
            )
        ctx.save_for_backward(input, weight, mean, (variance + eps).rsqrt(), count)
        ctx.groups, ctx.eps, ctx.spans, ctx.total = groups, eps, groups.spans, groups.count
        unbiased = squares / (count - 1).clamp(min=1)
        ctx.mark_non_differentiable(mean, unbiased)
        return output, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """d input = w·s·(dy − Σdy/n − x̂·Σ(dy·x̂)/n), the sums over the whole group."""
        input, weight, mean, inverse_std, count = ctx.saved_tensors
        grad = gradients[0]
        sums = mean.new_zeros(2, ctx.total, mean.shape[1])  # Σdy·x̂ and Σdy of the local rows
        axes = [axis for axis in range(input.dim()) if axis != 1]
        for span in ctx.spans:
            dy = grad[span.rows].to(mean.dtype)
            normal = _normal(input[span.rows], mean[span.group], inverse_std[span.group])
            sums[0, span.group] = (dy * normal).sum(axes)
            sums[1, span.group] = dy.sum(axes)
        grad_weight, grad_bias = sums[0].sum(0), sums[1].sum(0)
        everywhere = ctx.groups.group.all_reduce(sums.clone(), "activation")
        result = torch.empty_like(input)
        for span in ctx.spans:
            s, n = inverse_std[span.group], count[span.group].clamp(min=1)
            scale = s if weight is None else s * weight.to(s.dtype)
            normal = _normal(input[span.rows], mean[span.group], s)
            shift = _channels(everywhere[1, span.group] / n, input)
            slope = _channels(everywhere[0, span.group] / n, input)
            dy = grad[span.rows].to(mean.dtype)
            result[span.rows] = ((dy - shift - normal * slope) * _channels(scale, input)).to(
                input.dtype
            )
        if weight is None:
            return result, None, None, None, None
        return result, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


def _parts(input: Tensor, groups: BatchGroups, kind: torch.dtype) -> Tensor:
    """Local mean, sum of squared deviations and count: ``[groups, 2·C + 1]``."""
    channels = input.shape[1]
    parts = input.new_zeros(groups.count, 2 * channels + 1, dtype=kind)
    axes = [axis for axis in range(input.dim()) if axis != 1]
    for span in groups.spans:
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
    means, squares, counts = gathered.split((channels, channels, 1), dim=2)
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count.clamp(min=1)
    return mean, squares.sum(0) + (counts * (means - mean).square()).sum(0), count


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *(1 for _ in range(like.dim() - 2)))


def _normal(rows: Tensor, mean: Tensor, inverse_std: Tensor) -> Tensor:
    return (rows.to(mean.dtype) - _channels(mean, rows)) * _channels(inverse_std, rows)


def _empty_like(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """No rows here: an empty output that still leads the gradient (zero) to the parameters."""
    output = input * 1
    for parameter in (weight, bias):
        if parameter is not None:
            output = output + parameter.sum().to(output.dtype) * 0
    return output


def _need_two(part: Tensor, group: int) -> None:
    if part.numel() == part.shape[1]:
        _refuse_single(group)


def _refuse_single(group: int) -> None:
    raise RunError(
        f"batch norm: statistics group {group} holds one value per channel, at least 2 are needed",
        hint="Choose a batch size (or `normalize_over`) that leaves no group of a single example, "
        "or a model with group norm.",
    )


def use_groups(model: nn.Module, groups: BatchGroups) -> int:
    """Give every batch-norm layer of `model` statistics over `groups`; how many there were."""
    found = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm) and not isinstance(child, GroupBatchNorm):
                setattr(parent, name, GroupBatchNorm.of(child, groups))
                found += 1
    return found
