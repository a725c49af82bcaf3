"""A replica's rows cut into microbatches, evenly, and on the borders of statistics groups.

cut_rows(10, 4)                                     # 0:3 3:6 6:8 8:10
cut_rows(2, 4)                                      # 0:1 1:2 2:2 2:2: the last two are empty
cut_groups([0, 0, 0, 1, 1, 2], 2)                   # 0:5 5:6: groups stay whole
"""

import itertools
from collections.abc import Sequence


def cut_rows(rows: int, microbatches: int) -> list[slice]:
    """Consecutive rows, sizes differing by one at most, larger ones first."""
    each, more = divmod(rows, microbatches)
    ends = [0, *itertools.accumulate(each + (m < more) for m in range(microbatches))]
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def cut_groups(group_of_row: Sequence[int], microbatches: int) -> list[slice]:
    """The same with whole groups in the place of rows; `group_of_row` ascends."""
    starts = [0] if group_of_row else []
    for row, (before, group) in enumerate(itertools.pairwise(group_of_row), 1):
        if group != before:
            starts.append(row)
    ends = [*starts, len(group_of_row)]
    groups = cut_rows(len(starts), microbatches)
    return [slice(ends[group.start], ends[group.stop]) for group in groups]


def run_by(rows: Sequence[slice]) -> tuple[bool, ...]:
    """Which microbatches are run: those with rows; the first if none has any.

    (Collectives inside a stage need every replica.)
    """
    filled = [part.stop > part.start for part in rows]
    return tuple(filled) if any(filled) else tuple(number == 0 for number in range(len(rows)))


def run_together(
    pieces: Sequence[slice], of_each: Sequence[tuple[bool, ...]]
) -> tuple[list[slice], tuple[bool, ...], frozenset[int]]:
    """Pieces, which are run, and which of those only stand in: where replicas have to keep step.

    ``of_each``: what `run_by` says of each replica. One that has fewer rows runs its first again.
    """
    runs = tuple(any(of_it) for of_it in zip(*of_each, strict=True))
    idle = frozenset(
        m for m, piece in enumerate(pieces) if m and runs[m] and piece.start == piece.stop
    )
    return [pieces[0] if m in idle else piece for m, piece in enumerate(pieces)], runs, idle
