"""Dropout whose masks do not depend on the split: a counter-based generator instead of a state.

    key = StepKey(seed=0)
    use_counted_dropout(model, key)
    key.begin(step, rows, rank)                # then forward: same rows, same masks, anywhere

The keep-or-drop of one element is a hash of (seed, step, path of the module, number of its call in
this step, position of the example in the global batch, index of the element in its example), so the
same elements drop on one device and on any number of ranks, and a resumed run needs no generator's
state. The mixing function is splitmix64's finaliser (Steele, Lea & Flood 2014), on int64 tensors.

What draws from torch's own generator inside a model (a functional dropout, noise) is seeded anew at
each step, by (seed, step, rank): repeatable and resumable, but dependent on the split; `verify`
shows the difference.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from shoal.parallel.specialise import specialise

_KINDS: dict[type[nn.Module], bool] = {  # whether whole channels drop
    nn.Dropout: False,
    nn.Dropout1d: True,
    nn.Dropout2d: True,
    nn.Dropout3d: True,
}

_RANGE = 1 << 24
_PIECE = 1 << 17  # numbers at once: as fast as torch's own dropout, measured on one core


@dataclass
class StepKey:
    """What the masks of the step in hand depend on; shared by all dropout layers of a replica."""

    seed: int
    step: int = 0
    rows: Tensor | None = None
    rank: int = 0
    calls: dict[str, int] = field(default_factory=dict)

    def begin(self, step: int, rows: Tensor, rank: int) -> None:
        """``rows``: positions of the local rows in the global batch."""
        self.step, self.rows, self.rank = step, rows, rank
        self.calls = {}
        torch.manual_seed(_key(self.seed, step, f"rank {rank}") & 0x7FFF_FFFF_FFFF_FFFF)

    def next_call(self, path: str) -> int:
        """How often the layer at `path` has been called in this step before now."""
        number = self.calls.get(path, 0)
        self.calls[path] = number + 1
        return number

    @contextlib.contextmanager
    def replaying(self, calls: dict[str, int]) -> Iterator[None]:
        """Inside, count calls on from `calls`: a block runs again and needs its masks again."""
        kept, self.calls = self.calls, dict(calls)
        try:
            yield
        finally:
            self.calls = kept


class CountedDropout(_DropoutNd):
    """A dropout layer with counter-based masks; whole channels drop where the original's do.

    Inputs are [rows, …]: one row an example, or as many for each, all of an example together.
    Any other first dimension gets masks by the rank's own rows: those depend on the split.
    """

    path: str
    by_channel: bool
    key: StepKey

    def forward(self, input: Tensor) -> Tensor:
        """`input` ÷ (1 − p) where kept, 0 elsewhere."""
        if not self.training or self.p == 0.0:
            return input
        return self.drop(input)

    def drop(self, input: Tensor) -> Tensor:
        """The same, where it is not left out."""
        dropped, scale = self._dropped(input), 1.0 / (1.0 - self.p) if self.p < 1.0 else 0.0
        if self.inplace:
            return input.mul_(scale).masked_fill_(dropped, 0.0)
        return (input * scale).masked_fill(dropped, 0.0)

    def _dropped(self, input: Tensor) -> Tensor:
        """Which elements drop: a boolean tensor that broadcasts to the shape of `input`."""
        shape = input.shape[1:2] if self.by_channel else input.shape[1:]
        name = f"{self.path}#{self.key.next_call(self.path)}"
        rows, repeats = self.key.rows, 0
        if rows is not None and len(rows):
            repeats, rest = divmod(input.shape[0], len(rows))
            repeats = 0 if rest else repeats
        if rows is None or not repeats:
            name += f"@rank {self.key.rank}"
            rows, repeats = torch.arange(input.shape[0]), 1
        key = _key(self.key.seed, self.key.step, name)
        dropped = chosen(key, rows.to(input.device), repeats * math.prod(shape), self.p)
        dropped = dropped.view(input.shape[0], *shape)
        return dropped.view(*dropped.shape, *(1 for _ in range(input.dim() - dropped.dim())))


def chosen(key: int, rows: Tensor, elements: int, probability: float) -> Tensor:
    """Which elements of each row a chance of `probability` hits: bool ``[len(rows), elements]``.

    A row's choice depends on its number, `elements`' order and the key (64 bits, signed) alone.
    """
    result = torch.empty(len(rows), elements, dtype=torch.bool, device=rows.device)
    # Numbers of 64 bits are needed for a mask of one: in pieces that stay in a core's cache.
    at_once = max(1, (_PIECE if rows.device.type == "cpu" else 64 * _PIECE) // max(1, elements))
    for start in range(0, len(rows), at_once):
        piece = slice(start, start + at_once)
        torch.lt(_bits(key, rows[piece], elements), round(probability * _RANGE), out=result[piece])
    return result


def use_counted_dropout(model: nn.Module, key: StepKey) -> int:
    """Give every dropout layer of `model` masks by `key`; how many there were.

    A layer of the user's own class keeps its `forward`, if it has one.
    """
    found = 0
    for path, layer in model.named_modules():
        kind = next((kind for kind in _KINDS if isinstance(layer, kind)), None)
        if kind is None:
            continue
        if type(layer).forward is kind.forward:
            specialise(layer, CountedDropout)
        if not isinstance(layer, CountedDropout):
            continue
        layer.path, layer.by_channel, layer.key = path, _KINDS[kind], key
        found += 1
    return found


def _bits(key: int, rows: Tensor, elements: int) -> Tensor:
    """Uniform integers in [0, 2²⁴): ``[len(rows), elements]``, int64."""
    golden = _signed(0x9E3779B97F4A7C15)
    row_keys = _mix((rows + 1) * golden + key)
    counters = torch.arange(1, elements + 1, device=rows.device) * golden
    return (_mix(row_keys[:, None] + counters[None, :]) >> 40) & (_RANGE - 1)


def _key(seed: int, step: int, name: str) -> int:
    return _signed(xxhash.xxh3_64_intdigest(f"{seed}/{step}/{name}".encode()))


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser, element-wise; shifts of int64 are arithmetic, hence the masks."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)
