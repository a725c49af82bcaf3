"""Numbers with units, as people write them and as people read them.

Duration.parse("2 epochs").steps(steps_per_epoch=12)   # 24
format_bytes(1288490188)                               # '1.2 GiB'
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, Literal

Unit = Literal["steps", "epochs", "seconds"]

_NAMES: dict[str, tuple[Unit, float]] = {
    "step": ("steps", 1),
    "epoch": ("epochs", 1),
    "ms": ("seconds", 0.001),
    "s": ("seconds", 1),
    "sec": ("seconds", 1),
    "second": ("seconds", 1),
    "min": ("seconds", 60),
    "minute": ("seconds", 60),
    "h": ("seconds", 3600),
    "hour": ("seconds", 3600),
}


@dataclass(frozen=True)
class Duration:
    """A length of training: a number of steps, of epochs, or of seconds."""

    value: float
    unit: Unit

    allowed: ClassVar[str] = (
        "a number with a unit, as in `5 steps`, `2 epochs`, `30s`, `10min`, `1h`"
    )

    def __post_init__(self) -> None:
        if not 0 < self.value < float("inf"):
            raise ValueError(f"must be more than 0, given {self.value:g}")
        if self.unit == "steps" and self.value != int(self.value):
            raise ValueError(f"must be a whole number of steps, given {self.value:g}")

    @classmethod
    def parse(cls, text: str) -> "Duration":
        """Read `5 steps`, `2epochs`, `30s`, `10 min`, `1h` (space optional, singular too).

        Raises ValueError that says what is allowed.
        """
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]+)\s*", text.lower())
        if match is None:
            raise ValueError(f"must be {cls.allowed}; given {text!r}")
        number, name = match.groups()
        known = _NAMES.get(name) or _NAMES.get(name.removesuffix("s"))
        if known is None:
            raise ValueError(f"has no unit {name!r}: it must be {cls.allowed}")
        unit, scale = known
        return cls(float(number) * scale, unit)

    def __str__(self) -> str:
        # Every digit: what is written into a file has to be read back as the same length.
        number = format(Decimal(repr(self.value)), "f")
        number = number.rstrip("0").rstrip(".") if "." in number else number
        if self.unit == "seconds":
            return f"{number}s"
        return f"{number} {self.unit.removesuffix('s') if self.value == 1 else self.unit}"

    def steps(self, steps_per_epoch: int) -> int | None:
        """How many steps this is (at least one); None for a duration in seconds."""
        if self.unit == "seconds":
            return None
        if self.unit == "epochs":
            return max(1, round(self.value * steps_per_epoch))
        return int(self.value)


def format_bytes(count: float) -> str:
    """`1.2 GiB`: binary prefixes, three figures at most."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            break
        if unit != "TiB":
            size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.3g} {unit}"


def format_seconds(seconds: float) -> str:
    """`0.81 s`, `1 min 05 s`, `2 h 03 min`."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_count(number: float) -> str:
    """`1,234`, and `12.3` for what is not whole."""
    whole = float(number).is_integer() or abs(number) >= 100
    return f"{number:,.0f}" if whole else f"{number:,.3g}"
