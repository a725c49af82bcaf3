"""What a rank of asynchronous SGD is, and what it is told to do.

Place(parts, shard)                      # the owners' parts of its model, and its own shard
Grant(step=3, index=1, attempt=0, version=2)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.sync.asynchronous.parts import Part
from shoal.sync.asynchronous.shard import Shard


@dataclass(frozen=True)
class Grant:
    """A contribution that this rank is to compute; ``is_refused``: only to say that it was not."""

    step: int
    index: int
    attempt: int
    version: int
    is_refused: bool = False


@dataclass(frozen=True)
class Ledger:
    """Where rank 0 writes a line per contribution, and tells what is out of the ordinary."""

    write: Callable[[dict[str, Any]], None] = lambda _line: None
    tell: Callable[[str, str, int, int], None] = lambda _event, _message, _rank, _step: None


@dataclass(frozen=True)
class Place:
    """What a rank is: the owners' parts of its model, by rank, and its own shard if it owns one.

    ``meets``: whether owners wait for one another before an update, and exchange the norms of their
    parts.
    """

    parts: Mapping[int, Part]
    shard: Shard | None
    meets: bool = False


@dataclass(frozen=True)
class Recall:
    """A contribution that an owner is to drop, as its worker has died."""

    step: int
    index: int
    attempt: int
