"""Schedules: a factor on the learning rate, as a pure function of the share of samples seen.

    s = samples seen ÷ samples in all, 0 to 1         w = warmup
    factor(s) = min(1, s ÷ w) · shape(s)
    constant   1
    cosine     final + (1 − final) · (1 + cos π·p) ÷ 2,     p = (s − w) ÷ (1 − w), 0 before w
    step       factor to the power of how many of ``at`` are ≤ s

    schedule = build_schedule(component)
    group["lr"] = group["initial_lr"] * schedule(samples by its middle ÷ all)

In the middle of a step's own samples, as above, neither the first step of a warm-up nor the last
of a cosine has a rate of 0, and nothing depends on how many steps this process has run.
Cosine: Loshchilov and Hutter 2017 (arXiv 1608.03983), one period.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import UserCodeError
from shoal.recipe.component import is_import_path, thaw
from shoal.recipe.user import Named, call, check_options, load, unknown

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Constant:
    """1 after the warm-up."""

    warmup: float = 0.0

    def __call__(self, share: float) -> float:
        return warm(share, self.warmup)


@dataclass(frozen=True)
class Cosine:
    """From 1 at the end of the warm-up down to ``final`` along half a cosine."""

    final: float = 0.0
    warmup: float = 0.0

    def __call__(self, share: float) -> float:
        progress = min(1.0, max(0.0, (share - self.warmup) / (1 - self.warmup)))
        fall = (1 + math.cos(math.pi * progress)) / 2
        return warm(share, self.warmup) * (self.final + (1 - self.final) * fall)


@dataclass(frozen=True)
class Step:
    """Multiplied by ``factor`` at each of the shares ``at`` of the whole training."""

    at: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    warmup: float = 0.0

    def __call__(self, share: float) -> float:
        passed = sum(share >= each for each in self.at)
        return warm(share, self.warmup) * self.factor**passed


@dataclass(frozen=True)
class UsersSchedule:
    """A function of the user's: ``fn(share, **options)`` -> factor."""

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, share: float) -> float:
        factor = call(self.function, self.name, "schedule", share, **self.options)
        if isinstance(factor, int | float) and math.isfinite(factor):
            return float(factor)
        raise UserCodeError(
            f"schedule {self.name!r} returned {factor!r} for share {share:g}",
            hint="It must return a finite number, the factor on the learning rate.",
        )


def warm(share: float, warmup: float) -> float:
    """The factor of a linear warm-up from 0 over the first ``warmup`` of training."""
    return 1.0 if share >= warmup else max(0.0, share / warmup)


def build_schedule(component: Named) -> Schedule:
    """The schedule that a recipe names.

    Raises UsageError for a name, an import or options that cannot be.
    """
    options = thaw(component.options)
    if is_import_path(component.name):
        function = load(component.name, "schedule")
        check_options(function, component.name, options, "schedule", 0.0)
        return UsersSchedule(component.name, function, options)
    makers: dict[str, Callable[..., Schedule]] = {
        "constant": Constant,
        "cosine": Cosine,
        "step": Step,
    }
    if component.name not in makers:
        raise unknown(component.name, makers, "schedule")
    if "at" in options:
        options["at"] = tuple(options["at"])
    check_options(makers[component.name], component.name, options, "schedule")
    return makers[component.name](**options)
