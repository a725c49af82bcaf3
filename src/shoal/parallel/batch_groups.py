"""Groups of examples of the *global* batch whose statistics batch norm uses, wherever they lie.

    global batch   0 1 2 3 | 4 5 6 7 | 8 9          normalize_over: 4 → groups 0, 1, 2
    rank 0         0 1 2 3   4                      group 1 lies on both ranks: its mean and
    rank 1                     5 6 7   8 9          variance are combined from both parts

``normalize_over: batch`` is one group, the whole batch. A replica that computes its rows in several
microbatches, each of whole groups, says so by `microbatch`; what its layers note of each is one
step's in the end.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from shoal.comm import Group, Pending
from shoal.errors import RunError
from shoal.parallel.running import Tracker, track

Noted: TypeAlias = tuple[Tracker, Tensor, Tensor]  # a layer, means and variances of each group


@dataclass(frozen=True)
class Span:
    """The rows of one group that are on this rank: ``rows`` of the local batch."""

    group: int
    rows: slice


@dataclass
class BatchGroups:
    """How the rows of the step in hand fall into groups; shared by all layers of a replica."""

    normalize_over: int | None  # None: the whole batch is one group
    group: Group
    count: int = 1
    batch_examples: int = 0
    spans: tuple[Span, ...] = ()
    local_rows: int = 0
    stands_in: bool = False  # the rows are no part of this rank's share, and have no weight
    crosses: bool = False
    recomputing: bool = False
    _calls: Counter[int] = field(default_factory=Counter)
    _pending: dict[tuple[int, int], Noted] = field(default_factory=dict)
    _sent: list[Noted] = field(default_factory=list)
    _sum: Pending | None = None
    _there: set[int] = field(default_factory=set)  # groups with rows here, in any microbatch

    def begin(
        self,
        rows: Tensor,
        batch_examples: int,
        shares: list[tuple[int, int]],
        *,
        microbatch: int = 0,
        stands_in: bool | None = None,
    ) -> None:
        """Set the groups of a forward pass: of a step, or of one of its microbatches.

        ``rows``: positions of the local rows in the global batch (int64, ascending); ``shares``:
        every rank's (start, stop) of those positions; ``stands_in``: whether the rows have no
        weight, if that is not what the shares say. What microbatches note is put together.
        """
        size = self.normalize_over or max(1, batch_examples)
        self.batch_examples = batch_examples
        self.count = max(1, -(-batch_examples // size))
        self.local_rows = len(rows)
        start, stop = shares[self.group.rank]
        self.stands_in = start == stop and self.local_rows > 0 if stands_in is None else stands_in
        self.spans = _spans(rows, size)
        borders = [stop for _, stop in shares if 0 < stop < batch_examples]
        self.crosses = self.group.size > 1 and any(border % size for border in borders)
        self._calls.clear()
        if microbatch == 0:
            self._pending.clear()
            self._there.clear()
            self._sum = None
        if not self.stands_in:
            self._there.update(span.group for span in self.spans)

    def microbatch(self, rows: Tensor) -> None:
        """Let the layers see some of the step's rows only: whole groups of them."""
        self.local_rows = len(rows)
        self.spans = _spans(rows, self.normalize_over or max(1, self.batch_examples))

    def count_calls_anew(self) -> None:
        """The layers that run next have not been called yet in this microbatch."""
        self._calls.clear()

    def spans_of(self, rows: int) -> tuple[Span, ...]:
        """The spans of a layer's input of `rows` rows.

        A layer may see several rows of each example (crops, frames, tokens), those of an example
        together. Raises `RunError` where groups of examples cannot be told apart.
        """
        if rows == self.local_rows:
            return self.spans
        if self.normalize_over is None:
            return (Span(0, slice(0, rows)),) if rows else ()
        each, rest = divmod(rows, self.local_rows) if self.local_rows else (0, rows)
        if rest:
            raise RunError(
                f"batch norm over groups of {self.normalize_over} examples: a layer got {rows} "
                f"rows for {self.local_rows} examples",
                hint="Set normalize_over: batch, or give the layer the same number of rows for "
                "each example.",
            )
        return tuple(
            Span(span.group, slice(span.rows.start * each, span.rows.stop * each))
            for span in self.spans
        )

    @contextlib.contextmanager
    def recomputation(self) -> Iterator[None]:
        """Inside, statistics are used again and not counted again."""
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False

    def track_later(
        self, layer: Tracker, means: Tensor, variances: Tensor, call: int | None = None
    ) -> None:
        """Note the statistics ``[groups, C]`` of the groups on this rank; zero for the others.

        ``call``: which of the layer's calls in the forward pass this is, None to count them. The
        same call of another microbatch has other groups, and is added to the first.
        """
        if call is None:
            call = self._calls[id(layer)]
            self._calls[id(layer)] += 1
        noted = self._pending.get((id(layer), call))
        if noted is not None:
            # Not in place: torch keeps the tensors for the backward pass.
            means, variances = noted[1] + means, noted[2] + variances
        self._pending[id(layer), call] = (layer, means, variances)

    def send(self) -> None:
        """Start to bring the statistics of groups that lie whole on one rank to all ranks.

        One small collective a step for all layers together, beside the backward pass; normalising
        itself needed none. Collective, after the forward pass.
        """
        if not self._pending:
            return
        # Taken now: a block that the user's own code checkpoints runs again in the backward pass,
        # and what it notes there has been counted.
        self._sent = list(self._pending.values())
        self._pending.clear()
        kind = self._sent[0][1]
        present = kind.new_zeros(self.count, 1)
        if self._there:
            present[sorted(self._there)] = 1.0
        parts = [present, *(part.to(kind.dtype) for _, m, v in self._sent for part in (m, v))]
        # Every group is on exactly one rank, and zero on the others: the sum is exact.
        self._sum = self.group.all_reduce_later(torch.cat(parts, 1), "activation")

    def finish(self) -> None:
        """Bring running statistics up to date, if `send` has sent any. Collective."""
        if self._sum is None:
            return
        layers = [layer for layer, _, _ in self._sent]
        present, *statistics = torch.split(self._sum.wait(), [1, *self._widths()], 1)
        track(layers, statistics, present.flatten())
        self._sent.clear()
        self._sum = None

    def _widths(self) -> Iterator[int]:
        for _, means, variances in self._sent:
            yield means.shape[1]
            yield variances.shape[1]


def _spans(rows: Tensor, size: int) -> tuple[Span, ...]:
    """Rows (positions in the global batch) by groups of `size` consecutive positions."""
    group_of_row = torch.div(rows, size, rounding_mode="floor")
    numbers, lengths = torch.unique_consecutive(group_of_row, return_counts=True)
    first, spans = 0, []
    for number, length in zip(numbers.tolist(), lengths.tolist(), strict=True):
        spans.append(Span(number, slice(first, first + length)))
        first += length
    return tuple(spans)
