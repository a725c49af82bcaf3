"""Shares and microbatches: pure arithmetic of positions, and putting outputs together."""

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.job import shares
from shoal.parallel import Share, cut
from shoal.parallel.microbatches import joined, microbatches


@given(st.integers(0, 60), st.integers(1, 7), st.integers(1, 9))
def test_shares_cover_a_batch_along_borders_of_groups(n: int, ranks: int, multiple: int) -> None:
    found = shares(n, ranks, multiple)
    assert found[0][0] == 0
    assert found[-1][1] == n
    assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(found))
    assert all(stop % multiple == 0 or stop == n for _, stop in found)
    units = [-(-(stop - start) // multiple) for start, stop in found]
    assert max(units) - min(units) <= 1


@given(st.integers(0, 9), st.integers(0, 40), st.integers(1, 7), st.integers(1, 5))
def test_pieces_of_a_share_are_consecutive_and_none_is_empty(
    first: int, n: int, parts: int, multiple: int
) -> None:
    start = first * multiple
    found = cut(start, start + n, parts, multiple)
    assert [i for a, b in found for i in range(a, b)] == list(range(start, start + n))
    assert all(b > a and (a - start) % multiple == 0 for a, b in found)
    assert len(found) == min(parts, -(-n // multiple))


def batch(start: int, stop: int) -> SimpleNamespace:
    rows = torch.arange(start, stop)
    table = torch.zeros(3, 2)
    return SimpleNamespace(inputs=(rows.double()[:, None], table), targets=rows * 2, rows=rows)


def test_rows_go_with_their_positions_even_where_some_were_left_out() -> None:
    share = Share(10, ((0, 5), (5, 10)))
    whole = batch(5, 10)
    kept = torch.tensor([5, 8, 9])
    whole.rows, whole.targets = kept, kept * 2
    whole.inputs = (kept.double()[:, None], torch.zeros(4, 2))
    parts = microbatches(whole, share, 1, 2, 1, together=False)
    assert [part.rows.tolist() for part, _ in parts] == [[5], [8, 9]]
    assert [part.targets.tolist() for part, _ in parts] == [[10], [16, 18]]
    assert parts[0][0].inputs[1].shape == (4, 2)  # no row for each example: given whole


def test_ranks_in_step_run_equally_many_and_stand_in_without_weight() -> None:
    share = Share(4, ((0, 3), (3, 4), (4, 4)))
    counts = [
        [
            counts
            for _, counts in microbatches(batch(*share.reads(r)), share, r, 3, 1, together=True)
        ]
        for r in range(3)
    ]
    assert counts == [[True] * 3, [True, False, False], [False] * 3]
    alone = microbatches(batch(0, 1), share, 2, 3, 1, together=False)
    assert [counts for _, counts in alone] == [False]


@dataclass(frozen=True)
class Answer:
    logits: Tensor
    loss: Tensor


def test_outputs_are_put_together_whatever_holds_them() -> None:
    parts = [
        {"a": Answer(torch.full((n, 2), float(n)), torch.tensor(n)), "b": [torch.ones(n)]}
        for n in (2, 0, 1)
    ]
    whole = joined(parts)
    assert whole["a"].logits.tolist() == [[2.0, 2.0], [2.0, 2.0], [1.0, 1.0]]
    assert whole["a"].loss == 2
    assert whole["b"][0].shape == (3,)
    assert joined([]) is None
