"""How the ranks that save a checkpoint meet: every rank says one JSON value, every rank hears all.

    rank 0   {"entries": …} ─┐            ┌─> [rank 0's, rank 1's]
    rank 1   {"error": …}   ─┴─ gather ───┴─> [rank 0's, rank 1's]

A rank that fails says so at the next meeting in place of its value, so that none is left waiting.
"""

from typing import Any, Protocol


class Meeting(Protocol):
    """The ranks of one save. Tests and tools that have one process use `Alone`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather_json(self, value: Any) -> list[Any]:
        """What every rank gave, by rank. Every rank calls this, in the same order."""
        ...


class Alone:
    """A meeting of one."""

    rank = 0
    size = 1

    def all_gather_json(self, value: Any) -> list[Any]:
        return [value]
