"""`Certificate`: what a verification found."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.errors import RunFolderError

KINDS = ("output", "loss", "gradient", "parameter", "buffer", "optimizer")
TOLERANCE = 1e-10  # in float64, by the measure of `measure.py`


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
class Certificate:
    """Whether a strategy computes what one device does, and if not, where it begins to differ.

    ``max_error`` has the largest error of each kind over all ranks and steps. ``refused`` says why
    nothing could be compared; then ``ok`` is False and the rest is empty.
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

    def __bool__(self) -> bool:
        return self.ok

    def to_json(self) -> dict[str, Any]:
        """The contract's document."""

        # JSON has no infinity: what cannot be compared is as far away as a number can say.
        def number(error: float | None) -> float | None:
            return error if error is None else min(error, sys.float_info.max)

        first = self.first_difference
        told = None if first is None else {**first.to_json(), "error": number(first.error)}
        return {
            "ok": self.ok,
            "strategy": self.strategy,
            "steps": self.steps,
            "dtype": self.dtype,
            "max_error": {kind: number(error) for kind, error in self.max_error.items()},
            "first_difference": told,
            "cause": self.cause,
            "refused": self.refused,
            "tolerance": TOLERANCE,
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
        for kind in KINDS:
            error = self.max_error[kind]
            shown = "none to compare" if error is None else f"{error:.1e}"
            lines.append(f"  largest error, {kind:<10} {shown}")
        lines.append(f"  allowed                   {TOLERANCE:.0e}")
        if self.first_difference is not None:
            first = self.first_difference
            lines.append(
                f"first difference: {first.kind} {first.name}, step {first.step}, "
                f"error {first.error:.2g}"
            )
        if self.cause is not None:
            lines.append(f"likely cause: {self.cause}")
        return "\n".join(lines)
