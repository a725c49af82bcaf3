"""Values of any shape as rows for people: nested keys as paths, numbers with their units.

    {"optimizer": {"name": "sgd", "lr": 0.1}, "memory_bytes": 3221225472}

        optimizer.name   sgd
        optimizer.lr     0.1
        memory_bytes     3 GiB

The documents of a run grow keys with every version; what they hold is shown, not known beforehand.
Units come from the last word of a key, as everywhere in Shoal: ``_bytes``, ``_s``, ``_per_s``.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from shoal.units import format_bytes, format_count, format_seconds

# YAML's aliases can make a small file a huge value: both bounds end that.
_MAX_ROWS = 400
_MAX_DEPTH = 8
_MAX_TEXT = 400


@dataclass(frozen=True)
class Row:
    """One line of a table of values."""

    key: str
    value: str


@dataclass(frozen=True)
class RankTable:
    """Numbers of every rank, as text: one row a quantity, with the columns' names in ``head``."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def number(value: object) -> float:
    """The number that ``value`` is, as a float; NaN for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def rows(value: object) -> list[Row]:
    """``value`` as at most 400 rows; a scalar or an empty value is a row without a key."""
    found = list(islice(_walk(value, "", 0), _MAX_ROWS + 1))
    if len(found) > _MAX_ROWS:
        found[_MAX_ROWS] = Row("…", "more than can be shown here: see the file itself")
    return found


def _walk(value: object, path: str, depth: int) -> Iterator[Row]:
    if depth < _MAX_DEPTH and isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _walk(inner, f"{path}.{key}" if path else str(key), depth + 1)
    elif depth < _MAX_DEPTH and _is_nested(value):
        assert isinstance(value, list)
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{path}[{index}]", depth + 1)
    else:
        yield Row(path, text_of(value, path))


def _is_nested(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(one, dict | list) for one in value)


def text_of(value: object, key: str = "") -> str:
    """``value`` for people; ``key`` names its unit (``memory_bytes``, ``step_s.forward``)."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(value, key)
    if isinstance(value, list):
        shown = ", ".join(text_of(one, key) for one in value[:32] if not isinstance(one, list))
        return f"{shown}, … ({len(value):,} in all)" if len(value) > 32 else shown or "none"
    if isinstance(value, Mapping):
        return "…" if value else "none"
    text = str(value)
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


def _number(value: float, key: str) -> str:
    try:
        finite = math.isfinite(value)
    except OverflowError:
        return "a number too large to show"
    if not finite:
        return str(value)
    unit = next((found for one in reversed(key.split(".")) if (found := _unit(one))), "")
    if unit:
        return _UNITS[unit](value)
    return f"{value:,}" if isinstance(value, int) and key != "seed" else f"{value:g}"


def _unit(key: str) -> str:
    """The unit that a key ends in, if it ends in one; the longest, as in ``bytes_per_s``."""
    name = key.split("[")[0]
    return next((unit for unit in _UNITS if name == unit or name.endswith(f"_{unit}")), "")


def seconds_text(seconds: float) -> str:
    """Seconds for people, milliseconds and microseconds too."""
    if 0 < abs(seconds) < 0.001:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if 0 < abs(seconds) < 0.1 else format_seconds(seconds)


def _prefixed(value: float) -> str:
    size = float(value)
    for prefix in ("", "k", "M", "G", "T"):
        if abs(size) < 1000:
            return f"{size:.3g} {prefix}"
        size /= 1000
    return f"{size:.3g} P"


# Longest first: ``links.bytes_per_s`` is no time.
_UNITS: Mapping[str, Callable[[float], str]] = {
    "bytes_per_s": lambda value: f"{format_bytes(value)}/s",
    "flops_per_s": lambda value: f"{_prefixed(value)}FLOP/s",
    "per_s": lambda value: f"{value:g} /s",
    "per_second": lambda value: f"{value:g} /s",
    "flops": lambda value: f"{_prefixed(value)}FLOP",
    "bytes": format_bytes,
    "seconds": seconds_text,
    "s": seconds_text,
}


def moment_text(value: object) -> str:
    """A time of an event: seconds since 1970 as UTC, anything else as it is."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 1e9 < value < 1e11:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return "" if value is None else text_of(value)


def rank_table(quantities: Sequence[tuple[str, Sequence[Any]]], what: str) -> RankTable | None:
    """Bytes per rank: a column a rank up to 8 ranks, else the least, the mean and the most.

    ``quantities`` are (name, bytes of each rank); ``what`` heads the first column. None if there
    is no number in it.
    """
    known = [(name, _numbers(values)) for name, values in quantities]
    known = [(name, values) for name, values in known if values]
    if not known:
        return None
    ranks = max(len(values) for _, values in known)
    if ranks <= 8:
        head = (what, *(f"rank {rank}" for rank in range(ranks)))
        cells = [[format_bytes(value) for value in values] for _, values in known]
        cells = [row + ["–"] * (ranks - len(row)) for row in cells]
    else:
        head = (what, "least", "mean", "most", "ranks")
        cells = [
            [
                *(format_bytes(one) for one in (min(v), sum(v) / len(v), max(v))),
                format_count(len(v)),
            ]
            for _, v in known
        ]
    lines = ((name, *row) for (name, _), row in zip(known, cells, strict=True))
    return RankTable(head, tuple(lines))


def _numbers(values: object) -> list[float]:
    if not isinstance(values, list):
        return []
    return [one for one in values if isinstance(one, int | float) and not isinstance(one, bool)]
