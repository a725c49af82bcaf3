"""Batch normalisation over statistics groups: group g by its own mean and variance,

    y = (x − mean_g) / √(var_g + ε) · weight + bias

and the running statistics take one step per group, in the order of groups, on one device too.

    groups = BatchGroups(normalize_over=None, group=groups.statistics)
    use_groups(model, groups)                                # every batch norm of the model
    groups.begin(rows, batch_examples, shares)               # then forward
    groups.send()                                            # then backward
    groups.finish()
"""

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from shoal.errors import Refused
from shoal.parallel.across import BatchNormAcross
from shoal.parallel.batch_groups import BatchGroups, Span
from shoal.parallel.running import track
from shoal.parallel.single_value import refuse_single
from shoal.parallel.specialise import specialise

__all__ = ["BatchGroups", "GroupBatchNorm", "use_groups"]


Affine: TypeAlias = tuple[Tensor | None, Tensor | None]  # weight and bias


class GroupBatchNorm(_BatchNorm):
    """Batch normalisation over `BatchGroups`; all else is the original layer's."""

    groups: BatchGroups

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[N, C, …]``. Collective where a group lies on several ranks."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        if not self.training and self.running_mean is not None:
            return functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return self.normalise_across(input) if self.groups.crosses else self._within(input)

    def normalise(
        self, input: Tensor, weight: Tensor | None, bias: Tensor | None, call: int
    ) -> Tensor:
        """As in training, with a weight and a bias that are given: for a traced graph.

        ``call``: which of this layer's calls in the forward pass this is.
        """
        affine = weight, bias
        if self.groups.crosses:
            return self.normalise_across(input, affine)
        return self._within(input, affine, call)

    @property
    def _tracks(self) -> bool:
        """Whether this call is one that running statistics are to learn from."""
        wanted = self.training and self.track_running_stats and self.running_mean is not None
        return wanted and not self.groups.recomputing

    def _within(
        self, input: Tensor, affine: Affine | None = None, call: int | None = None
    ) -> Tensor:
        """Every group lies whole on one rank: torch's own kernel on each group's rows."""
        kind = torch.promote_types(input.dtype, torch.float32)
        # Not num_features: the channels may be cut, and these some of them.
        means = input.new_zeros(self.groups.count, input.shape[1], dtype=kind)
        weight, bias = affine or (self.weight, self.bias)
        variances = torch.zeros_like(means)
        if self.groups.stands_in:
            outputs = [self._by_itself(input, weight, bias)]
        else:
            spans = self.groups.spans_of(input.shape[0])
            parts = zip(_cut(input, spans), spans, strict=True)
            outputs = [
                self._of_group(part, s.group, (means, variances), (weight, bias))
                for part, s in parts
            ]
        if self._tracks:
            self.groups.track_later(self, means, variances, call)
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs) if outputs else _empty_like(input, weight, bias)

    def _of_group(
        self, part: Tensor, group: int, statistics: tuple[Tensor, Tensor], affine: Affine
    ) -> Tensor:
        """The rows of one group, normalised; its statistics go into their rows."""
        if part.numel() == part.shape[1]:
            raise refuse_single(group)
        (means, variances), (weight, bias) = statistics, affine
        # A momentum of 1 leaves the group's own mean and unbiased variance in the rows.
        return functional.batch_norm(
            part,
            means[group],
            variances[group],
            weight,
            bias,
            training=True,
            momentum=1.0,
            eps=self.eps,
        )

    def _by_itself(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Rows without weight, whose output only has to be a sensible number."""
        axes = [axis for axis in range(input.dim()) if axis != 1]
        kind = torch.promote_types(input.dtype, torch.float32)
        variance, mean = torch.var_mean(input.detach().to(kind), axes, correction=0)
        return functional.batch_norm(input, mean, variance, weight, bias, eps=self.eps)

    def normalise_across(self, input: Tensor, affine: Affine | None = None) -> Tensor:
        """Some group lies on several ranks: combine the parts, here and in the backward pass."""
        output, means, variances, counts = BatchNormAcross.apply(  # type: ignore[no-untyped-call]
            input, *(affine or (self.weight, self.bias)), self.eps, self.groups
        )
        if self._tracks:
            self.track(means, variances, (counts.flatten() > 0).to(means.dtype))
        return output  # type: ignore[no-any-return]

    def track(self, means: Tensor, variances: Tensor, present: Tensor) -> None:
        """One step of the running statistics for each group that is `present`, in their order.

        A group is absent if none of its examples could be read.
        """
        track([self], [means, variances], present)


def _cut(input: Tensor, spans: tuple[Span, ...]) -> tuple[Tensor, ...]:
    """The rows of each span. One alone is the input itself: cutting and joining would copy it.

    Several by `split`, whose backward pass is one copy, where slices have one each.
    """
    if len(spans) < 2:
        return (input,) * len(spans)
    lengths = [span.rows.stop - span.rows.start for span in spans]
    return torch.split(input, lengths)


def _empty_like(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """No rows here: an empty output that still leads the gradient (zero) to the parameters."""
    output = input * 1
    for parameter in (weight, bias):
        if parameter is not None:
            output = output + parameter.sum().to(output.dtype) * 0
    return output


def use_groups(model: nn.Module, groups: BatchGroups) -> int:
    """Give every batch-norm layer of `model` statistics over `groups`; how many there were.

    Raises `Refused` for a batch norm of the user's own class that has a `forward` of its own.
    """
    found = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        if not isinstance(layer, GroupBatchNorm):
            if type(layer).forward not in (_BatchNorm.forward, SyncBatchNorm.forward):
                raise _refused(name, layer)
            specialise(layer, GroupBatchNorm)
            assert isinstance(layer, GroupBatchNorm)
        layer.groups = groups
        found += 1
    return found


def refuse_batch_norm(model: nn.Module, microbatches: int) -> None:
    """Raise `Refused` for a batch norm that would see one microbatch in place of the batch."""
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise Refused(
                f"mb:{microbatches}: {name} is a batch norm over the whole batch, which is not "
                "there at once in microbatches: the gradient would be another",
                hint="Use mb:1, group norm, or normalize_over: N, statistics over N examples.",
            )


def _refused(name: str, layer: _BatchNorm) -> Refused:
    return Refused(
        f"{name} is a {type(layer).__name__}: a batch norm with a forward of its own, which would "
        "use the statistics of one rank's examples instead of the whole batch's",
        hint="Use torch.nn.BatchNorm1d, 2d or 3d and put what else it does in a layer after it, "
        "or train with the strategy single.",
    )
