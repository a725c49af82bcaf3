"""The kinds of values that the notation knows: whole numbers, numbers, words and flags.

    Whole(0, "S, the largest staleness in optimizer steps").read("2")      # 2

A text that is not of its kind is a `StrategyError`; a number out of its range is `Refused`, with
the nearest one that works.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

from shoal.errors import Refused, StrategyError

LARGEST = 10**9 - 1


class Kind(Protocol):
    """Reads, checks and writes one value of an option."""

    @property
    def what(self) -> str:
        """What the value stands for."""

    @property
    def allowed(self) -> str:
        """What may stand here, in words."""

    def read(self, text: str) -> Any:
        """The value of ``text``; raises StrategyError if it is not of this kind."""

    def check(self, value: Any) -> None:
        """Raises Refused for a value out of range."""

    def write(self, value: Any) -> str:
        """The text that `read` turns into ``value``."""


@dataclass(frozen=True)
class Whole:
    """A whole number, ``least`` or more; ``form`` is how it stands in the notation."""

    least: int
    what: str
    form: str = "{}"

    @property
    def allowed(self) -> str:
        """What may stand here, in words."""
        return f"a whole number, {self.least} or more"

    def read(self, text: str) -> int:
        """Digits with an optional sign."""
        if not re.fullmatch(r"-?[0-9]{1,40}", text):
            raise StrategyError(f"{self.what}, must be {self.allowed}; given {text!r}")
        return int(text)

    def check(self, value: int) -> None:
        """Raises Refused below ``least`` and above 999,999,999."""
        if isinstance(value, bool) or not isinstance(value, int):
            raise StrategyError(f"{self.what}, must be {self.allowed}; given {value!r}")
        near = min(max(value, self.least), LARGEST)
        if near != value:
            limit = f"{LARGEST} at most" if value > near else f"{self.least} or more"
            raise Refused(
                f"{self.what}, is {value} and must be {limit}",
                hint=f"Nearest that works: {self.form.format(near)}.",
            )

    def write(self, value: int) -> str:
        """Decimal digits."""
        return str(value)


@dataclass(frozen=True)
class Real:
    """A number from ``least`` to ``most``; ``least`` itself only if ``inclusive``."""

    least: float
    most: float
    what: str
    form: str = "{}"
    inclusive: bool = True

    @property
    def allowed(self) -> str:
        """What may stand here, in words."""
        low = f"{self.least:g} or more" if self.inclusive else f"more than {self.least:g}"
        return f"a number, {low}" + ("" if self.most == math.inf else f", {self.most:g} at most")

    def read(self, text: str) -> float:
        """A decimal number: no infinity, no underscores, no plus sign."""
        if not re.fullmatch(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE]-?[0-9]+)?", text):
            raise StrategyError(f"{self.what}, must be {self.allowed}; given {text!r}")
        return float(text)

    def check(self, value: float) -> None:
        """Raises Refused out of the range."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise StrategyError(f"{self.what}, must be {self.allowed}; given {value!r}")
        low = self.least <= value if self.inclusive else self.least < value
        if low and value <= self.most and math.isfinite(value):
            return
        near = self.most if value > self.most else self.least if self.inclusive else None
        hint = None if near is None else f"Nearest that works: {self.form.format(f'{near:g}')}."
        raise Refused(f"{self.what}, is {value:g} and must be {self.allowed}", hint=hint)

    def write(self, value: float) -> str:
        """The shortest text that reads back equal; without `+`, which begins an execution."""
        return repr(float(value)).replace("e+", "e").removesuffix(".0")


@dataclass(frozen=True)
class Word:
    """One of a few names."""

    words: tuple[str, ...]
    what: str

    @property
    def allowed(self) -> str:
        """What may stand here, in words."""
        return " | ".join(self.words)

    def read(self, text: str) -> str:
        """The word itself."""
        self.check(text)
        return text

    def check(self, value: str) -> None:
        """Raises StrategyError for another word, naming the nearest."""
        if value not in self.words:
            raise StrategyError(
                f"{self.what}, must be {self.allowed}; given {value!r}",
                hint=did_you_mean(str(value), self.words),
            )

    def write(self, value: str) -> str:
        """The word itself."""
        return value


@dataclass(frozen=True)
class Flag:
    """A word that is there or not."""

    word: str
    what: str

    @property
    def allowed(self) -> str:
        """What may stand here, in words."""
        return f"{self.word}, or nothing"

    def read(self, text: str) -> bool:
        """True for the word."""
        if text != self.word:
            hint = did_you_mean(text, [self.word])
            raise StrategyError(f"must be {self.allowed}; given {text!r}", hint=hint)
        return True

    def check(self, value: bool) -> None:
        """Any truth value will do."""
        if not isinstance(value, bool):
            raise StrategyError(f"{self.what}, must be true or false; given {value!r}")

    def write(self, value: bool) -> str:
        """The word, or nothing."""
        return self.word if value else ""


@dataclass(frozen=True)
class Switch:
    """`1` or `0`."""

    what: str

    @property
    def allowed(self) -> str:
        """What may stand here, in words."""
        return "0 | 1"

    def read(self, text: str) -> bool:
        """True for `1`."""
        if text not in ("0", "1"):
            raise StrategyError(f"{self.what}, must be 0 or 1; given {text!r}")
        return text == "1"

    def check(self, value: bool) -> None:
        """Raises StrategyError for what is neither true nor false."""
        if not isinstance(value, bool):
            raise StrategyError(f"{self.what}, must be true or false; given {value!r}")

    def write(self, value: bool) -> str:
        """`1` or `0`."""
        return "1" if value else "0"


def did_you_mean(name: str, known: Sequence[str], text: str | None = None) -> str | None:
    """`Did you mean dp2?`, with ``text`` in place of the name found; None if nothing is near."""
    close = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    if not close:
        return None
    return f"Did you mean {close[0] if text is None else text.format(close[0])}?"
