"""Dropout whose masks do not depend on the split: a counter-based generator instead of a state.

The keep-or-drop of one element is a hash of (seed, step, path of the module, number of its call in
this step, position of the example in the global batch, index of the element in its example), so the
same elements drop on one device and on any number of ranks, and a resumed run needs no generator's
state. The mixing function is splitmix64's finaliser (Steele, Lea & Flood 2014), on int64 tensors.

What draws from torch's own generator inside a model (a functional dropout, noise) is seeded anew at
each step, by (seed, step, rank): repeatable and resumable, but dependent on the split; `verify`
shows the difference.
"""

import math
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd


@dataclass
class StepKey:
    """What the masks of the step in hand depend on; shared by all dropout layers of a replica."""

    seed: int
    step: int = 0
    rows: Tensor | None = None

    def begin(self, step: int, rows: Tensor, rank: int) -> None:
        """``rows``: positions of the local rows in the global batch."""
        self.step = step
        self.rows = rows
        torch.manual_seed(_key(self.seed, step, f"rank {rank}") & 0x7FFF_FFFF_FFFF_FFFF)


class CountedDropout(_DropoutNd):
    """A dropout layer with counter-based masks; whole channels drop where the original's do."""

    def __init__(self, p: float, inplace: bool, path: str, by_channel: bool, key: StepKey) -> None:
        super().__init__(p, inplace)
        self.path = path
        self.by_channel = by_channel
        self.key = key
        self._call = (-1, 0)

    @torch.compiler.disable
    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        if self.p >= 1.0:
            return input * 0.0
        mask = self._mask(input)
        return input.mul_(mask) if self.inplace else input * mask

    def _mask(self, input: Tensor) -> Tensor:
        rows = self.key.rows
        if rows is None or input.shape[0] != len(rows):
            # Not one row per example (a bag of tokens, say): positions on this rank must do.
            rows = torch.arange(input.shape[0])
        step, calls = self._call
        number = calls if step == self.key.step else 0
        self._call = (self.key.step, number + 1)
        shape = input.shape[1:2] if self.by_channel else input.shape[1:]
        key = _key(self.key.seed, self.key.step, f"{self.path}#{number}")
        keep = _uniform(key, rows.to(input.device), math.prod(shape)) >= self.p
        mask = keep.view(len(rows), *shape).to(input.dtype) / (1.0 - self.p)
        return mask.view(*mask.shape, *(1 for _ in range(input.dim() - mask.dim())))


def _key(seed: int, step: int, name: str) -> int:
    return _signed(xxhash.xxh3_64_intdigest(f"{seed}/{step}/{name}".encode()))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, element-wise; shifts of int64 are arithmetic, hence the masks."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)


def _uniform(key: int, rows: Tensor, elements: int) -> Tensor:
    """Uniform numbers in [0, 1) for each row and element: ``[rows, elements]``, float32."""
    golden = _signed(0x9E3779B97F4A7C15)
    row_keys = _mix((rows + 1) * golden + key)
    counters = torch.arange(1, elements + 1, device=rows.device) * golden
    bits = (_mix(row_keys[:, None] + counters[None, :]) >> 40) & 0xFF_FFFF
    return bits.to(torch.float32) * (1.0 / (1 << 24))


def use_counted_dropout(model: nn.Module, key: StepKey) -> int:
    """Replace every dropout layer of `model`; how many there were."""
    found = 0
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            if type(child) in _BY_CHANNEL:
                full = f"{path}.{name}" if path else name
                layer = CountedDropout(
                    child.p, child.inplace, full, _BY_CHANNEL[type(child)], key
                )
                setattr(parent, name, layer.train(child.training))
                found += 1
    return found


_BY_CHANNEL: dict[type[nn.Module], bool] = {
    nn.Dropout: False,
    nn.Dropout1d: True,
    nn.Dropout2d: True,
    nn.Dropout3d: True,
}
