"""`staleness.jsonl`: a line per contribution, in the order in which they were applied.

    {"step": 7, "index": 1, "worker": 0, "computed_on": 5, "applied_at": 7, "staleness": 2}

``"refused": true`` beside, where a contribution was not finite and was left out.

    past = by_contribution(lines, path)          # {(7, 1): {"step": 7, …}}: to follow that run
    histogram(lines)                             # {"0": 14, "1": 30, "2": 6}
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shoal.errors import RunFolderError

FILE = "staleness.jsonl"


def by_contribution(
    lines: Iterable[Mapping[str, Any]], path: Path, each: int, bound: int
) -> dict[tuple[int, int], Mapping[str, Any]]:
    """A ledger by (step, index), for a run of `each` contributions a step and staleness `bound`.

    Raises `RunFolderError` for what no such run can have written.
    """
    past: dict[tuple[int, int], Mapping[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            step, index, base = (int(line[key]) for key in ("step", "index", "computed_on"))
        except (KeyError, TypeError, ValueError):
            raise RunFolderError(
                f"{path}:{number} is no line of a ledger of contributions",
                hint=f"Give the {FILE} of a run with async:S.",
            ) from None
        if not (0 <= index < each and 0 <= base <= step and step - base <= bound):
            raise RunFolderError(
                f"{path}:{number}: contribution {index} of step {step}, computed on version "
                f"{base}, cannot be of a run of {each} contributions a step and staleness {bound}",
                hint="Replay a ledger with the strategy of its run.",
            )
        past[step, index] = line
    return past


def histogram(lines: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many contributions were applied at each staleness; refused ones are left out."""
    counts = Counter(int(line["staleness"]) for line in lines if not line.get("refused"))
    return {str(staleness): counts[staleness] for staleness in sorted(counts)}
