"""Copies of a snapshot's tensors in host memory, so that training goes on while they are saved.

    weights, optimizer state          buffers
    (any device, any strides)  ──▶  (host, row-major, kept)  ──▶  save, in a thread

The buffers are kept from one checkpoint to the next: fresh memory costs a page fault for every
4 KiB, which takes longer than the copy itself.

    copies = Copies()
    held = copies.take(snapshot)        # good until the next `take`
"""

from dataclasses import replace

import torch
from torch import Tensor

from shoal.checkpoint.snapshot import Piece, Snapshot


class Copies:
    """The buffers of one rank; the memory of its weights and optimizer state once more."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, snapshot: Snapshot) -> Snapshot:
        """The same snapshot of tensors of its own; the one taken before is written over."""
        tensors = {name: self._copied(name, piece) for name, piece in snapshot.tensors.items()}
        # Copies from a GPU go on by themselves until here.
        for device in {p.tensor.device for p in snapshot.tensors.values() if p.tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = {name: piece.tensor for name, piece in tensors.items()}
        return replace(snapshot, tensors=tensors)

    def _copied(self, name: str, piece: Piece) -> Piece:
        tensor = piece.tensor.detach()
        if tensor.layout is not torch.strided:
            return piece  # no file can hold it, and the save will say so
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return Piece(buffer.copy_(tensor, non_blocking=True), piece.part)
