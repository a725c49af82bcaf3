"""How far ranks that compute in float32 or bf16 may be from float64: as one device's rounding says.

With R one device in float64, L one device in the lower precision and M the ranks, on one batch,

    |M − R|  ≤  |M − L| + |L − R|  ≤  2 · |L − R|

A split changes the order of sums, so M − L is a second rounding of the same size as L − R, which is
measured: hence the factor of two, of which the second part is the split's. Each tensor is given
what the worst of its kind shows, and not less than one rounding of its type: Adam turns a gradient
that is noise into a step of full size, in one tensor here and in another there, and the next step
begins from those weights. Errors add up over steps: the largest so far counts.

    allowed = 2 · largest |L − R| of its kind + unit of rounding
"""

from dataclasses import dataclass, field

import torch

from shoal.verify.measure import errors
from shoal.verify.record import Record

FACTOR = 2.0
_IN_BF16 = ("output", "loss", "gradient", "gradient_norm", "clipped")  # under autocast


@dataclass(frozen=True)
class Precision:
    """What a verification computes in: parameters in ``dtype``, under autocast if ``bf16``."""

    name: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.name == "float64" else torch.float32

    @property
    def bf16(self) -> bool:
        return self.name == "bfloat16"

    @property
    def is_full(self) -> bool:
        return self.name == "float64"

    def unit(self, kind: str) -> float:
        """One rounding of the numbers that a kind of tensors is made of."""
        low = self.bf16 and kind in _IN_BF16
        return torch.finfo(torch.bfloat16 if low else self.dtype).eps


@dataclass
class Yardstick:
    """One device's own errors in a lower precision, the largest so far by kind and name."""

    precision: Precision
    seen: dict[str, dict[str, float]] = field(default_factory=dict)

    def measure(self, low: Record, right: Record) -> None:
        """Note how far one device's step is from float64, and say in `right` what is allowed."""
        for kind, theirs in right.tensors.items():
            known = self.seen.setdefault(kind, {})
            for name, error in errors(low.tensors[kind], theirs).items():
                known[name] = max(known.get(name, 0.0), error)
            right.allowed[kind] = self._allowed(kind, right)

    def _allowed(self, kind: str, right: Record) -> dict[str, float]:
        known = self.seen[kind]
        floating = {n: e for n, e in known.items() if right.tensors[kind][n].is_floating_point()}
        largest = max(floating.values(), default=0.0)
        unit = self.precision.unit(kind)
        return {name: FACTOR * largest + unit if name in floating else 0.0 for name in known}

    def by_kind(self) -> dict[str, float]:
        """The largest error of each kind."""
        return {kind: max(known.values()) for kind, known in self.seen.items() if known}
