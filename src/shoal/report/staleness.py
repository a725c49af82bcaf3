"""How old the weights were that contributions of an asynchronous run were computed on.

staleness_rows(summary)        # 0 steps   ███  12 (10 %)
                               # 1 step    ██████████████████  96 (80 %)
staleness_text(summary)        # 'staleness 1.1 on average, at most 2 (bound 2)'
"""

import math
from collections.abc import Mapping
from typing import Any

from shoal.report.values import Row, number, text_of

_WIDEST = 24  # of a bar, in characters
_OTHERS = {"refused": "refused, not finite", "taken_back": "claims taken back"}


def staleness_rows(summary: Mapping[str, Any]) -> list[Row]:
    """The histogram, a row per staleness; empty for other runs."""
    given = summary.get("staleness")
    if not isinstance(given, Mapping):
        return []
    rows = [
        Row(name, text_of(given[name])) for name in ("bound", "largest", "mean") if name in given
    ]
    contributions = given.get("contributions")
    counts = contributions if isinstance(contributions, Mapping) else {}
    known = {str(name): number(count) for name, count in counts.items()}
    known = {name: count for name, count in known.items() if math.isfinite(count) and count >= 0}
    total, most = sum(known.values()), max(known.values(), default=0.0)
    for name, count in known.items():
        bar = "█" * round(_WIDEST * count / most) if most else ""
        share = f"{count / total:.0%}".replace("%", " %") if total else "none"
        label = f"{name} step" if name == "1" else f"{name} steps"
        rows.append(Row(label, f"{bar} {count:,.0f} ({share})".strip()))
    rows += [Row(label, text_of(given[name])) for name, label in _OTHERS.items() if given.get(name)]
    return rows


def staleness_text(summary: Mapping[str, Any]) -> str:
    """One line; empty for other runs."""
    given = summary.get("staleness")
    if not isinstance(given, Mapping):
        return ""
    mean, largest = number(given.get("mean")), number(given.get("largest"))
    if not (math.isfinite(mean) and math.isfinite(largest)):
        return ""
    bound = text_of(given.get("bound"))
    text = f"staleness {mean:.2g} on average, at most {largest:g} (bound {bound})"
    refused = number(given.get("refused"))
    return text + (f", {refused:,.0f} contributions refused" if refused > 0 else "")
