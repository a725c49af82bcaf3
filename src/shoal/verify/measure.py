"""How far two tensors are apart, by the contract's measure.

    error = max|a − b| ÷ max(max|b|, 0.001 × scale)

b is one device's tensor, and ``scale`` the median of max|tensor| over the tensors of its kind that
are not zero: without it, a gradient whose true value is zero (a key bias of attention) would be
rounding noise divided by rounding noise. Counters (integer tensors) are compared absolutely.
"""

import statistics
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

FLOOR = 0.001


def magnitude(tensor: Tensor) -> float:
    """max|tensor|; 0 for an empty one."""
    if not tensor.numel():
        return 0.0
    return float(tensor.any() if tensor.dtype == torch.bool else tensor.abs().max())


def scale_of(tensors: Iterable[Tensor]) -> float:
    """The median of max|tensor| over floating-point tensors that are not zero; 0 without any."""
    sizes = [magnitude(tensor) for tensor in tensors if tensor.is_floating_point()]
    sizes = [size for size in sizes if size > 0]
    return statistics.median(sizes) if sizes else 0.0


def error(mine: Tensor, reference: Tensor, scale: float, size: float | None = None) -> float:
    """The error of `mine` against `reference`; infinity for another shape, or for NaN in one.

    ``size``: max|b| of the whole tensor, where `reference` is a part of one.
    """
    if mine.shape != reference.shape:
        return float("inf")
    if not mine.numel():
        return 0.0
    if not (reference.is_floating_point() or reference.is_complex()):
        return float((mine.to(torch.float64) - reference.to(torch.float64)).abs().max())
    difference = float((mine - reference).abs().max())
    if difference != difference:  # NaN in one of them
        return float("inf")
    if difference == 0.0:
        return 0.0
    size = max(magnitude(reference) if size is None else size, FLOOR * scale)
    return difference / size if size else float("inf")


def errors(
    mine: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    whole: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """The error of each tensor of one kind, by name; a name that only one side has is infinity.

    ``whole``: the tensors that `reference` has parts of, whose sizes are what errors are held
    against.
    """
    whole = reference if whole is None else whole
    scale = scale_of(whole.values())
    return {
        name: error(mine[name], reference[name], scale, magnitude(whole[name]))
        if name in mine and name in reference
        else float("inf")
        for name in dict.fromkeys([*reference, *mine])
    }
