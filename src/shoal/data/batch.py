"""A batch: some examples of one step's global batch, with the places that they have in it.

step 7's global batch      row  0 1 2 3 | 4 5 6 7        rank 1 reads rows 4..8
Batch(inputs, targets, ids=[…], rows=[4, 5, 7], bad=(BadRecord(id=…),))      row 6 is unreadable
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class BadRecord:
    """An example that was left out: its number in the set, where it lies, and why."""

    id: int
    where: str
    why: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples of one step.

    ``inputs`` [n, C, H, W] float32 (token ids: [n, L] int64), ``targets`` [n] int64, ``ids`` [n]
    int64: the examples' numbers in their split, ``rows`` [n] int64: their positions within the
    global batch.
    """

    inputs: Tensor
    targets: Tensor
    ids: Tensor
    rows: Tensor
    bad: tuple[BadRecord, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> "Batch":
        """The same batch on a device; ``dtype`` applies to what is floating point."""
        return replace(
            self,
            inputs=_moved(self.inputs, device, dtype, channels_last),
            targets=_moved(self.targets, device, dtype, False),
            ids=self.ids.to(device, non_blocking=True),
            rows=self.rows.to(device, non_blocking=True),
        )


def _moved(
    tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype | None, last: bool
) -> Tensor:
    image = last and tensor.ndim == 4
    return tensor.to(
        device=device,
        dtype=dtype if tensor.is_floating_point() else None,
        non_blocking=True,
        memory_format=torch.channels_last if image else torch.preserve_format,
    )
