"""Dropout's arithmetic, given which elements drop; and dropout within attention.

    drop(key, name, "dropout", input, 0.1)        # input ÷ (1 − p) where kept, 0 elsewhere

Attention with dropout is computed in parts, since a fused kernel draws its own masks:

    softmax(q kᵀ · scale + mask) → drop → · v
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.parallel.randomness.key import StepKey
from shoal.parallel.randomness.masks import ANYWHERE, Place, dropped

# Whether whole channels drop, and whether to SELU's saturation value instead of 0.
KINDS: dict[str, tuple[bool, bool]] = {
    "dropout": (False, False),
    "native_dropout": (False, False),
    "feature_dropout": (True, False),
    "alpha_dropout": (False, True),
    "feature_alpha_dropout": (True, True),
}
ATTENTION = "scaled_dot_product_attention"

_ALPHA = 1.7580993408473766  # λα of SELU, as in torch's alpha_dropout (Klambauer et al. 2017)


def drop(
    key: StepKey,
    name: str,
    kind: str,
    input: Tensor,
    probability: float,
    *,
    inplace: bool = False,
    place: Place = ANYWHERE,
) -> Tensor:
    """`input` with elements or channels dropped, in training; ``kind``: one of `KINDS`."""
    by_channel, alpha = KINDS[kind]
    shape = tuple(input.shape[:2] if by_channel else input.shape)
    mask = dropped(key, name, shape, probability, device=input.device, place=place)
    mask = (
        mask.view(*mask.shape, *(1 for _ in range(input.dim() - len(shape))))
        if by_channel
        else mask
    )
    if alpha and probability < 1.0:
        return _saturate(input, mask, probability, inplace=inplace)
    scale = 1.0 / (1.0 - probability) if probability < 1.0 else 0.0
    if inplace:
        return input.mul_(scale).masked_fill_(mask, 0.0)
    return (input * scale).masked_fill(mask, 0.0)


def _saturate(input: Tensor, mask: Tensor, probability: float, *, inplace: bool) -> Tensor:
    """a·x + b where kept, a·(−λα) + b elsewhere: mean and variance stay."""
    a = 1.0 / math.sqrt((_ALPHA**2 * probability + 1.0) * (1.0 - probability))
    kept, other = _ALPHA * a * probability, _ALPHA * a * (probability - 1.0)
    if inplace:
        return input.mul_(a).add_(kept).masked_fill_(mask, other)
    return (input * a + kept).masked_fill(mask, other)


@dataclass(frozen=True)
class Attention:
    """What `scaled_dot_product_attention` is told beside its tensors."""

    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def attend(
    key: StepKey,
    name: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    told: Attention,
    place: Place = ANYWHERE,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with counted dropout.

    ``tensors``: query, key and value ``[B, …, heads, length, width]``, and the mask (bool: where to
    look; floating: added) or None. `place` is that of the query. A query that may look nowhere gets
    zeros, as from torch's.
    """
    q, k, v, mask = _as_autocast(*tensors)
    with torch.autocast(q.device.type, enabled=False):
        if told.enable_gqa:
            k, v = (each.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for each in (k, v))
        scale = 1.0 / math.sqrt(q.shape[-1]) if told.scale is None else told.scale
        scores = torch.matmul(q * scale, k.transpose(-2, -1))
        if told.is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(mask.logical_not(), -math.inf)
        elif mask is not None:
            scores = scores + mask
        kind = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.ops.aten._safe_softmax.default(scores, -1, kind)
        weights = drop(key, name, "dropout", weights, told.dropout_p, place=place)
        return torch.matmul(weights.to(v.dtype), v)


def _as_autocast(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The tensors in autocast's type, where it is on: what it does for the fused operation."""
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v, mask
    kind = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        wide = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(kind) if wide else tensor

    return cast(q), cast(k), cast(v), mask if mask is None else cast(mask)
