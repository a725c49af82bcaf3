"""Weighted means of tensors over a group of ranks, some megabytes at a time.

average([weight, bias], 24 / 50, group)          # in place, the same bits on every rank
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shoal.comm import Group

PIECE_BYTES = 8 << 20


def average(tensors: Sequence[Tensor], weight: float, group: Group) -> None:
    """Replace each tensor by Σ weight · tensor over the ranks, whose weights add up to 1.

    Collective over ``group``; the tensors have the same shapes and types on all its ranks.
    """
    if group.size == 1:
        return
    with torch.no_grad():
        for piece in pieces(tensors, PIECE_BYTES):
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in piece]).mul_(weight)
            group.all_reduce(flat, "parameter")
            parts = torch.split(flat, [tensor.numel() for tensor in piece])
            for tensor, part in zip(piece, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))


def pieces(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one type, at most `limit` bytes together, or one alone."""
    piece: list[Tensor] = []
    size = 0
    for tensor in tensors:
        own = tensor.numel() * tensor.element_size()
        if piece and (size + own > limit or tensor.dtype != piece[0].dtype):
            yield piece
            piece, size = [], 0
        piece.append(tensor)
        size += own
    if piece:
        yield piece
