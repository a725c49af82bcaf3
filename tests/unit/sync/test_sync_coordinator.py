"""The coordinator without threads: letters in any order that ranks may send them in."""

import itertools
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from shoal.sync.asynchronous.coordinator import Coordinator, Course
from shoal.sync.asynchronous.letters import Finished, Kind, Record


class Ranks:
    """Ranks that do what they are told, in a random order. Rank r is worker and owner."""

    def __init__(self, seed: int, ranks: int = 2, **course: Any) -> None:
        self.dice = random.Random(seed)
        self.letters: dict[int, deque[tuple[Kind, Sequence[float]]]] = {
            rank: deque() for rank in range(ranks)
        }
        plain: dict[str, Any] = {
            "first": 0,
            "total": 12,
            "bound": 2,
            "each": ranks,
            "ranks": ranks,
            "workers": range(ranks),
            "owners": range(ranks),
            "boundary_after": lambda step: (step // 5 + 1) * 5,
        }
        self.course = Course(**{**plain, **course})
        self.ledger: list[dict[str, Any]] = []
        self.records: list[Record] = []
        self.busy: dict[int, Sequence[float]] = {}
        self.at = dict.fromkeys(range(ranks), self.course.first)
        self.version = dict.fromkeys(range(ranks), self.course.first)
        self.accepted: dict[tuple[int, int], int] = {}  # by owner and step
        self.rest_at: list[int] = []
        self.coordinator = Coordinator(
            self.course,
            lambda rank, kind, numbers: self.letters[rank].append((kind, numbers)),
            self.ledger.append,
            lambda *_told: None,
        )
        for rank in range(ranks):
            self.coordinator.ready(rank, (self.course.first, 0, 0))

    def act(self, stop: bool = False) -> bool:
        """One thing that may happen now; False if nothing can."""
        able: list[tuple[str, int]] = [("read", r) for r, box in self.letters.items() if box]
        able += [("finish", rank) for rank in self.busy]
        able += [
            ("apply", r)
            for r, v in self.version.items()
            if self.accepted.get((r, v)) == len(self.at)
        ]
        if not able:
            return False
        what, rank = self.dice.choice(able)
        self.coordinator.seconds += 1.0
        getattr(self, f"_{what}")(rank, float(stop))
        return True

    def _finish(self, rank: int, _stop: float) -> None:
        step, index, attempt, *_ = map(int, self.busy.pop(rank))
        told = Finished(step, index, attempt, 1.0, 1.0, 0.0, refused=False)
        self.coordinator.finished(rank, told)

    def _apply(self, rank: int, _stop: float) -> None:
        self.version[rank] += 1
        self.coordinator.applied(rank, self.version[rank])

    def _read(self, rank: int, stop: float) -> None:
        kind, numbers = self.letters[rank].popleft()
        if kind is Kind.GRANT:
            assert rank not in self.busy
            self.busy[rank] = numbers
        elif kind is Kind.ACCEPT:
            key = rank, int(numbers[0])
            self.accepted[key] = self.accepted.get(key, 0) + 1
        elif kind is Kind.RECORD:
            self._record(rank, Record.of(tuple(numbers)), stop)

    def _record(self, rank: int, record: Record, stop: float) -> None:
        self.at[rank] = record.step + 1
        if rank == 0:
            self.records.append(record)
        if record.is_boundary:
            # Nobody holds anything of a later step before all are here.
            assert not self.busy
            assert set(self.version.values()) == {record.step + 1}
            if not record.stop and record.step + 1 < self.course.total:
                self.coordinator.ready(rank, (record.step + 1, 0, 0))
        elif stop:
            self.coordinator.ready(rank, (record.step + 1, 1, 0))


@pytest.mark.parametrize("seed", range(20))
def test_every_contribution_is_applied_once_within_the_bound(seed: int) -> None:
    ranks = Ranks(seed, ranks=2 + seed % 3)
    while ranks.act():
        pass
    keys = [(line["step"], line["index"]) for line in ranks.ledger]
    assert keys == [(step, index) for step in range(12) for index in range(ranks.course.each)]
    assert all(0 <= line["staleness"] <= 2 for line in ranks.ledger)
    assert [record.step for record in ranks.records] == list(range(12))
    assert [each.step + 1 for each in ranks.records if each.is_boundary] == [5, 10, 12]


@pytest.mark.parametrize("seed", range(20))
def test_a_stop_brings_the_next_boundary_near(seed: int) -> None:
    ranks = Ranks(seed, total=400, boundary_after=lambda _step: 1 << 60)
    while len(ranks.records) < 3:
        assert ranks.act()
    while ranks.act(stop=True):
        pass
    last = ranks.records[-1]
    assert last.is_boundary
    assert last.stop > 0
    # What was claimed by then is done: as far as the bound reached, and what the letters took.
    assert last.step <= 3 + 4 * (ranks.course.bound + 1)
    assert not any(record.stop for record in ranks.records[:-1])


def test_what_is_due_by_the_clock_is_due_at_boundaries_alone() -> None:
    ranks = Ranks(0, total=60, boundary_after=lambda _step: 1 << 60, every_s=40.0)
    while ranks.act():
        pass
    told = [0.0]
    for record in ranks.records:
        if record.is_boundary:
            told.append(record.seconds)
        else:
            assert record.seconds == told[-1] or len(told) == 1
    assert len(told) > 3
    gaps = [late - soon for soon, late in itertools.pairwise(told[1:-1])]
    assert all(gap >= 40.0 for gap in gaps)


def test_a_claim_that_nothing_is_heard_of_goes_to_another_and_counts_once() -> None:
    ranks = Ranks(0, bound=1, owners=range(1), total=4)
    coordinator, answers = ranks.coordinator, ranks.letters

    def grant(rank: int) -> Sequence[float] | None:
        granted = [numbers for kind, numbers in answers[rank] if kind is Kind.GRANT]
        answers[rank].clear()
        return granted[0][:3] if granted else None

    def finish(rank: int, key: Sequence[float]) -> None:
        step, index, attempt = map(int, key)
        coordinator.seconds += 1.0
        told = Finished(step, index, attempt, 1.0, 1.0, 0.0, refused=False)
        coordinator.finished(rank, told)

    own, held = grant(0), grant(1)
    while own is not None:  # as far as the bound allows
        finish(0, own)
        own = grant(0)
    assert held is not None
    coordinator.look_round()
    assert coordinator.taken_back == 0  # it is not long yet
    coordinator.seconds += 1000.0
    coordinator.look_round()
    assert coordinator.taken_back == 1
    again = grant(0)
    assert again is not None
    assert list(again) == [held[0], held[1], held[2] + 1]
    finish(1, held)
    assert answers[0][0][0] is Kind.DISCARD  # its owner is told
    answers[0].clear()
    finish(0, again)
    assert answers[0][0][0] is Kind.ACCEPT


@pytest.mark.parametrize(("update_s", "waits"), [(0.01, True), (3.5, False)])
def test_a_worker_waits_for_an_update_only_where_updates_are_quick(
    update_s: float, waits: bool
) -> None:
    granted: list[Sequence[float]] = []

    def send(rank: int, kind: Kind, numbers: Sequence[float]) -> None:
        if kind == Kind.GRANT:
            granted.append((rank, *numbers[:4]))

    course = Course(0, 9, 2, 1, 1, (0,), (0,), lambda _step: 9)
    coordinator = Coordinator(course, send, lambda _line: None, lambda *_told: None)
    coordinator.ready(0, (0.0, 0.0, 0.0))
    for step in range(3):
        coordinator.seconds += 0.3  # a contribution
        coordinator.finished(0, Finished(step, 0, 0, 1.0, 1.0, 0.0, False))
        before = len(granted)
        coordinator.seconds += update_s
        coordinator.applied(0, step + 1)
    # The newest work was given out before its update was there, or after.
    assert before == (3 if waits else 4)
    assert granted[3][4] == (3 if waits else 2)  # the version that it is computed on
