"""The rule by which workers claim contributions: the bound, the order, what is taken back."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as some

from shoal.sync.claims import Claim, Claims, simulated_seconds


@pytest.mark.parametrize(("bound", "times"), [(0, 1.0), (1, 2.0), (2, 2.5), (4, 2.5)])
def test_one_of_two_workers_four_times_slower(bound: int, times: float) -> None:
    # The figures of docs/architecture.md. The start and the end cost less than 1 % of 1,000 steps.
    sync = 4.0 * 1000
    assert sync / simulated_seconds([1.0, 4.0], bound, 1000) == pytest.approx(times, rel=0.01)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_equal_workers_are_as_fast_as_sync(bound: int) -> None:
    assert simulated_seconds([1.0, 1.0, 1.0], bound, 50) == 50


def test_contributions_are_claimed_in_order_and_within_the_bound() -> None:
    claims = Claims(each=2, bound=1)
    given_out = [claims.claim(0) for _ in range(5)]
    assert [claim and claim.key for claim in given_out] == [(0, 0), (0, 1), (1, 0), (1, 1), None]
    claims.advance(1)
    assert claims.claim(1) == Claim(2, 0, worker=1, version=1)


def test_nothing_is_given_out_from_the_limit_on() -> None:
    claims = Claims(each=1, bound=5, limit=2)
    assert [claims.claim(0) is None for _ in range(3)] == [False, False, True]
    claims.limit = 3
    assert claims.claim(0) == Claim(2, 0, 0, version=0)


def test_what_is_taken_back_is_claimed_again_on_a_newer_version_and_counts_once() -> None:
    claims = Claims(each=2, bound=2)
    slow, quick = claims.claim(0), claims.claim(1)
    assert slow is not None
    assert quick is not None
    assert claims.finish(quick)
    claims.take_back(slow)
    again = claims.claim(1)
    assert again == Claim(0, 0, worker=1, version=0, attempt=1)
    assert not claims.finish(slow)  # the worker that was stopped wakes up
    assert claims.finish(again)
    assert claims.quiet
    claims.take_back(again)  # too late: it counts
    assert claims.quiet


def test_a_run_goes_on_from_a_version() -> None:
    claims = Claims(each=3, bound=1, version=7)
    assert claims.claim(0) == Claim(7, 0, 0, version=7)
    assert claims.begun == 8


def test_versions_of_a_ledger_are_waited_for_and_kept() -> None:
    claims = Claims(each=1, bound=2, computed_on={(0, 0): 0, (1, 0): 0, (2, 0): 2})
    assert [claims.claim(0), claims.claim(0), claims.claim(0)] == [
        Claim(0, 0, 0, version=0),
        Claim(1, 0, 0, version=0),
        None,  # on version 2, which is not there yet
    ]
    claims.advance(2)
    assert claims.claim(0) == Claim(2, 0, 0, version=2)


@given(
    seconds=some.lists(some.integers(1, 9), min_size=1, max_size=4),
    bound=some.integers(0, 4),
    steps=some.integers(1, 30),
)
def test_staleness_never_exceeds_the_bound(seconds: list[int], bound: int, steps: int) -> None:
    done: list[Claim] = []
    simulated_seconds([float(each) for each in seconds], bound, steps, done.append)
    assert sorted(claim.key for claim in done) == [
        (step, index) for step in range(steps) for index in range(len(seconds))
    ]
    assert all(0 <= claim.staleness <= bound for claim in done)


def test_the_bound_is_reached() -> None:
    done: list[Claim] = []
    simulated_seconds([1.0, 20.0], 3, 200, done.append)
    assert max(Counter(claim.staleness for claim in done)) == 3
