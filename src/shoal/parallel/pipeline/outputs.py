"""The outputs of several microbatches as those of one batch.

join([[a, loss_a], [b, loss_b]], rows=[3, 2])      # [cat(a, b), (3 · loss_a + 2 · loss_b) / 5]
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def join(outputs: Sequence[Sequence[Tensor]], rows: Sequence[int]) -> list[Tensor]:
    """Join output tensors one by one.

    Those with some rows for each example are put one after another; of others the mean is taken,
    weighted by rows, or the first if they are no floating-point numbers.
    """
    return [_joined(list(tensors), rows) for tensors in zip(*outputs, strict=True)]


def _joined(tensors: list[Tensor], rows: Sequence[int]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if all(tensor.dim() for tensor in tensors) and _by_row(tensors, rows):
        return torch.cat(tensors)
    if not tensors[0].is_floating_point():
        return tensors[0]
    weighted = [tensor * (count / sum(rows)) for tensor, count in zip(tensors, rows, strict=True)]
    return torch.stack(weighted).sum(0)


def _by_row(tensors: Sequence[Tensor], rows: Sequence[int]) -> bool:
    """Whether first dimensions are one multiple of the numbers of rows."""
    each = tensors[0].shape[0] // rows[0] if rows[0] else 0
    return each > 0 and all(
        tensor.shape[0] == each * count for tensor, count in zip(tensors, rows, strict=True)
    )
