"""A rank's share of a global batch, and the microbatches that it is worked through in.

global batch     0 1 2 3 4 5 6 7 8 9 | 10 11 …
rank 0           0 1 2 3 4 5                       shares
microbatches     0 1 2 │ 3 4 5                     mb:2
groups of 2      0 1 2 3 │ 4 5                     … along the borders of statistics groups

for part, counts in microbatches(batch, share, rank, 2, 1, together=False):
    …
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten


class LocalBatch(Protocol):
    """This replica's rows of a global batch."""

    @property
    def inputs(self) -> Any: ...
    @property
    def targets(self) -> Any: ...
    @property
    def rows(self) -> Tensor: ...


@dataclass(frozen=True)
class Share:
    """Which positions of a step's global batch each rank has: ``shares[rank] = (start, stop)``.

    A rank without any still computes, on the batch's first example and with no weight: a user's
    model need not bear a batch of no rows (``x.view(len(x), -1)`` does not), and collectives inside
    the model need every rank. ``first``: what is added to a position for random choices, where the
    batch is a part of a larger one.
    """

    batch_examples: int
    shares: tuple[tuple[int, int], ...]
    first: int = 0

    def is_empty(self, rank: int) -> bool:
        start, stop = self.shares[rank]
        return start == stop

    def reads(self, rank: int) -> tuple[int, int]:
        """The positions that `rank` reads: its share, or in place of an empty one the first."""
        return (0, 1) if self.is_empty(rank) else self.shares[rank]


@dataclass(frozen=True)
class Part:
    """Some rows of a local batch."""

    inputs: Any
    targets: Any
    rows: Tensor


def cut(start: int, stop: int, parts: int, multiple: int = 1) -> list[tuple[int, int]]:
    """``[start, stop)`` in `parts` consecutive pieces, empty ones left out.

    Borders are `multiple` apart from `start`, but for the last; sizes differ by one such unit.
    """
    units = -(-(stop - start) // multiple)
    each, more = divmod(units, parts)
    pieces, first = [], start
    for number in range(min(parts, units)):
        last = min(stop, first + (each + (number < more)) * multiple)
        pieces.append((first, last))
        first = last
    return pieces


def microbatches(
    batch: LocalBatch, share: Share, rank: int, parts: int, multiple: int, *, together: bool
) -> list[tuple[LocalBatch, bool]]:
    """This rank's microbatches, one at least, and whether their rows have any weight.

    ``together``: ranks run the same number of them, so that collectives within the model match;
    those with fewer run their first one again, without weight.
    """
    pieces = [cut(*reads, parts, multiple) for reads in share.shares]
    mine = pieces[rank]
    if not mine:  # what this rank has been given stands in for a share
        found: list[tuple[LocalBatch, bool]] = [(batch, False)]
    else:
        found = [(_rows(batch, start, stop), True) for start, stop in mine]
    if together:
        needed = max(map(len, pieces))
        found += [(found[0][0], False)] * (needed - len(found))
    return found


def _rows(batch: LocalBatch, start: int, stop: int) -> Part:
    """The rows at positions [start, stop) of the global batch; some may have been left out."""
    count = len(batch.rows)
    places = torch.searchsorted(
        batch.rows.contiguous(), torch.tensor([start, stop], device=batch.rows.device)
    )
    first, last = places.tolist()

    def taken(leaf: Any) -> Any:
        rows = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == count
        return leaf[first:last] if rows else leaf

    return Part(
        tree_map(taken, batch.inputs), tree_map(taken, batch.targets), batch.rows[first:last]
    )


def joined(outputs: Sequence[Any]) -> Any:
    """The outputs of several microbatches as those of one; None where there are none.

    What has no rows (a scalar, say) is the first one's.
    """
    if len(outputs) < 2:
        return outputs[0] if outputs else None
    _, structure = tree_flatten(outputs[0])
    rows = zip(*(tree_flatten(output)[0] for output in outputs), strict=True)
    return tree_unflatten([_join(row) for row in rows], structure)


def _join(row: Sequence[Any]) -> Any:
    first = row[0]
    if is_dataclass(first) and not isinstance(first, type):
        result = copy.copy(first)
        for part in fields(first):
            of_each = [getattr(each, part.name) for each in row]
            object.__setattr__(result, part.name, joined(of_each))
        return result
    if not isinstance(first, Tensor) or not first.dim():
        return first
    return torch.cat(list(row))
