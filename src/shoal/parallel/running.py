"""Running statistics of batch norm: one step for each group that is there, in the order of groups.

With f_i = momentum where group i is there, 0 where none of its examples could be read,

    running ← Π (1 − f_i) · running + Σ f_i · Π_(j>i) (1 − f_j) · m_i

and with ``momentum=None`` the plain average of all groups so far: f_i = 1 ÷ (number of group i).

    track([bn1, bn2], [means, variances, means, variances], present)      # [k, C] each, [k]
"""

from typing import Protocol

import torch
from torch import Tensor


class Tracker(Protocol):
    """A layer that keeps running statistics."""

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None


@torch.no_grad()
def track(layers: list[Tracker], statistics: list[Tensor], present: Tensor) -> None:
    """Bring layers up to date by their means and unbiased variances ``[k, C]`` of k groups.

    ``statistics``: means and variances of each layer in turn. A layer that stands there twice was
    called twice, and learns from both calls. ``present`` ``[k]``: 1 for a group that is there.
    """
    known: dict[float, tuple[Tensor, Tensor]] = {}  # most layers have one momentum
    for layer, means, variances in zip(layers, statistics[::2], statistics[1::2], strict=True):
        momentum = layer.momentum
        if momentum is None:
            kept, weights = _factors(_averaging(layer.num_batches_tracked, present))
        else:
            if momentum not in known:
                known[momentum] = _factors(present * momentum)
            kept, weights = known[momentum]
        for running, new in ((layer.running_mean, means), (layer.running_var, variances)):
            assert running is not None  # what keeps none is not tracked
            running.mul_(kept).add_((weights @ new).to(running.dtype))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(present.sum().to(torch.int64))


def _averaging(seen: Tensor | None, present: Tensor) -> Tensor:
    """The factors of a plain average after `seen` groups; without a count there is no step."""
    if seen is None:
        return torch.zeros_like(present)
    return present / (seen + present.cumsum(0)).clamp(min=1)


def _factors(factors: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of the running statistics (0-d), and the weight of each group, ``[k]``."""
    left = (1 - factors).flip(0).cumprod(0).flip(0)  # of what was there before each group
    after = torch.cat((left[1:], left.new_ones(1)))
    return left[0], factors * after
