"""Every byte that a rank gives to a collective, by collective and purpose; and its waits."""

from collections import defaultdict
from typing import Literal

Purpose = Literal[
    "gradient",
    "parameter",
    "activation",
    "agreement",
    "metric",
    "start-up",
    "evaluation",
    "checkpoint",
]


class Counter:
    """Payload of this rank's calls: numel × itemsize of each call's input, in bytes.

    ``waited_s``: seconds in which this rank stood still for collectives.
    """

    def __init__(self) -> None:
        self._bytes: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.waited_s = 0.0

    def add(self, collective: str, purpose: Purpose, count: int) -> None:
        self._bytes[collective, purpose] += count

    def as_dict(self) -> dict[str, dict[str, int]]:
        """``{"all_reduce": {"gradient": 1234}}``."""
        result: dict[str, dict[str, int]] = {}
        for (collective, purpose), count in sorted(self._bytes.items()):
            result.setdefault(collective, {})[purpose] = count
        return result
