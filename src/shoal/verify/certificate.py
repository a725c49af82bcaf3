"""`Certificate`: what a verification found."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal.errors import RunFolderError

KINDS = ("output", "loss", "gradient", "parameter", "buffer", "optimizer")
TOLERANCE = 1e-10  # in float64, by the measure of `measure.py`

# In the order in which a step computes: where a difference shows first. "clipped" is the gradient
# that the optimizer gets; outside it is a gradient like any other.
STAGES = (
    "output",
    "loss",
    "gradient",
    "gradient_norm",
    "clipped",
    "buffer",
    "parameter",
    "optimizer",
)


@dataclass(frozen=True)
class Difference:
    """The first thing that differs: its name, kind, step (0-based) and relative error."""

    name: str
    kind: str
    step: int
    error: float

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "step": self.step, "error": self.error}


@dataclass(frozen=True)
class Moved:
    """What became of a checkpoint that changed its layout.

    ``error``: how far the strategy's checkpoint, loaded into one device, is from one device's own
    state; ``same_bits``: whether it is bit for bit what the ranks held, and whether each rank got
    bit for bit its pieces of one device's checkpoint.
    """

    error: float
    same_bits: bool

    def to_json(self) -> dict[str, Any]:
        return {"error": number(self.error), "same_bits": self.same_bits}


def number(error: float | None) -> float | None:
    """JSON has no infinity: what cannot be compared is as far away as a number can say."""
    return error if error is None else min(error, sys.float_info.max)


@dataclass(frozen=True)
class Certificate:
    """Whether a strategy computes what one device does, and if not, where it begins to differ.

    ``max_error`` has the largest error of each kind over all ranks and steps, ``gradient_norm``
    that of the whole model's gradient. ``one_device``: below float64, one device's own largest
    errors in the same numbers, by kind, and ``of_allowed`` the largest share of what they allow.
    ``split``: what the strategy has cut, in words. ``refused`` says why nothing could be compared;
    then ``ok`` is False and the rest is empty.
    """

    ok: bool
    strategy: str
    steps: int
    max_error: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(KINDS))
    first_difference: Difference | None = None
    cause: str | None = None
    refused: str | None = None
    dtype: str = "float64"
    seconds: float = 0.0
    gradient_norm: float | None = None
    checkpoint: Moved | None = None
    one_device: dict[str, float] = field(default_factory=dict)
    of_allowed: float | None = None
    split: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self) -> dict[str, Any]:
        """The contract's document."""
        first = self.first_difference
        told = None
        if first is not None:
            kind = "gradient" if first.kind == "clipped" else first.kind
            told = {**replace(first, kind=kind).to_json(), "error": number(first.error)}
        return {
            "ok": self.ok,
            "strategy": self.strategy,
            "steps": self.steps,
            "dtype": self.dtype,
            "max_error": {kind: number(error) for kind, error in self.max_error.items()},
            "gradient_norm": number(self.gradient_norm),
            "checkpoint": None if self.checkpoint is None else self.checkpoint.to_json(),
            "first_difference": told,
            "cause": self.cause,
            "refused": self.refused,
            "tolerance": TOLERANCE if self.dtype == "float64" else None,
            "one_device": {kind: number(error) for kind, error in self.one_device.items()},
            "of_allowed": number(self.of_allowed),
            "split": list(self.split),
            "seconds": self.seconds,
        }

    def write(self, folder: Path) -> Path:
        """Write the document to ``certificate.json`` in a folder, which is made if need be.

        Raises `RunFolderError` where that cannot be.
        """
        path = folder / "certificate.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise RunFolderError(
                f"{path} cannot be written: {error.strerror or error}",
                hint="Give another folder with --out.",
            ) from error
        return path

    def text(self) -> str:
        """The certificate as a person reads it."""
        if self.refused is not None:
            return f"refused: {self.refused}"
        head = (
            f"{self.strategy} computes what one device computes"
            if self.ok
            else f"{self.strategy} does NOT compute what one device computes"
        )
        lines = [f"{head} ({self.steps} steps in {self.dtype}, {self.seconds:.1f} s)"]
        lines += [self._error_line(kind, self.max_error[kind]) for kind in KINDS]
        lines.append(self._error_line("gradient_norm", self.gradient_norm))
        lines.append(self._allowed_line())
        if self.checkpoint is not None:
            bits = "the same bits" if self.checkpoint.same_bits else "OTHER BITS"
            lines.append(
                f"  a checkpoint moved to one device and back has {bits}, error "
                f"{self.checkpoint.error:.1e}"
            )
        lines += [f"  split: {each}" for each in self.split]
        if self.first_difference is not None:
            first = self.first_difference
            lines.append(
                f"first difference: {first.kind.replace('_', ' ')} {first.name}, "
                f"step {first.step}, error {first.error:.2g}"
            )
        if self.cause is not None:
            lines.append(f"likely cause: {self.cause}")
        return "\n".join(lines)

    def _error_line(self, kind: str, error: float | None) -> str:
        shown = "none to compare" if error is None else f"{error:.1e}"
        line = f"  largest error, {kind.replace('_', ' '):<13} {shown}"
        if kind in self.one_device:
            line += f"   (one device's own: {self.one_device[kind]:.1e})"
        return line

    def _allowed_line(self) -> str:
        if self.of_allowed is None:
            return f"  allowed                      {TOLERANCE:.0e}"
        return (
            f"  allowed: what one device's own rounding shows; {self.of_allowed:.0%} of it was used"
        )
