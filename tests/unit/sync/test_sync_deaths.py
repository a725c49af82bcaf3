"""Workers that die, in a model without threads: at any moment, with letters still on their way.

Workers 2, 3, … send what they computed to the owners 0 and 1; rank 0 coordinates. When a worker
dies each owner may yet hear some of what it has sent, and loses the rest.
"""

import random
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import pytest

from shoal.errors import PeerLost
from shoal.sync.asynchronous.coordinator import Coordinator, Course
from shoal.sync.asynchronous.letters import Finished, Kind, Record

TOTAL, BOUND = 14, 2
Letter = tuple[Kind, Sequence[float]]


Key = tuple[int, int, int]  # step, index, attempt


class Owner:
    """What an owner has of each contribution: whose it is, once it counts."""

    def __init__(self) -> None:
        self.version = 0
        self.arrived: dict[Key, int] = {}
        self.verdicts: dict[Key, bool] = {}
        self.pieces: dict[tuple[int, int], int] = {}
        self.rounds = Counter[int]()
        self.heard_of: set[int] = set()  # deaths, once nothing more can come from there
        self.waiting: list[tuple[Key, int]] = []

    def judge(self, key: Key) -> None:
        if key in self.arrived and key in self.verdicts:
            worker = self.arrived.pop(key)
            if self.verdicts.pop(key):
                assert key[:2] not in self.pieces  # each is there once
                assert key[0] >= self.version
                self.pieces[key[:2]] = worker

    def drop(self, key: Key) -> None:
        self.verdicts.pop(key, None)
        assert key[0] >= self.version  # it was not applied
        self.pieces.pop(key[:2], None)
        self.rounds[key[0]] += 1


class World:
    """Owners and workers that act in a random order."""

    def __init__(self, seed: int, owners: int, workers: int) -> None:
        self.dice = random.Random(seed)
        self.workers = range(owners, owners + workers)
        self.each = workers
        ranks = owners + workers
        self.letters: dict[int, deque[Letter]] = {rank: deque() for rank in range(ranks)}
        self.busy: dict[int, Sequence[float]] = {}
        self.owners = [Owner() for _ in range(owners)]
        # What a worker has sent and an owner has not taken in yet: one queue for each pair.
        self.post: dict[tuple[int, int], deque[Key]] = {
            (worker, owner): deque() for worker in self.workers for owner in range(owners)
        }
        self.dead: set[int] = set()
        self.told: set[int] = set()  # deaths that the coordinator has heard of
        self.ledger: list[dict[str, Any]] = []
        self.records: list[Record] = []
        self.ready: list[int] = list(range(ranks))
        course = Course(
            first=0,
            total=TOTAL,
            bound=BOUND,
            each=workers,
            ranks=ranks,
            workers=self.workers,
            owners=range(owners),
            boundary_after=lambda step: (step // 5 + 1) * 5,
            expendable=self.workers,
        )
        self.coordinator = Coordinator(course, self._send, self.ledger.append, lambda *_: None)
        for rank in range(ranks):
            self.coordinator.ready(rank, (0, 0, 0))

    def _send(self, rank: int, kind: Kind, numbers: Sequence[float]) -> None:
        if rank not in self.dead:
            self.letters[rank].append((kind, numbers))

    def act(self) -> bool:
        able: list[tuple[str, Any]] = [("read", rank) for rank, box in self.letters.items() if box]
        able += [("finish", worker) for worker in self.busy]
        able += [("take", pair) for pair, pieces in self.post.items() if pieces]
        able += [("apply", n) for n, owner in enumerate(self.owners) if self._may_apply(owner)]
        able += [
            ("hear", (worker, n))
            for worker in self.dead
            for n, owner in enumerate(self.owners)
            if worker not in owner.heard_of and not self.post[worker, n]
        ]
        able += [
            ("lose", pair) for pair, pieces in self.post.items() if pieces and pair[0] in self.dead
        ]
        if not able:
            return False
        what, which = self.dice.choice(able)
        self.coordinator.seconds += 1.0
        getattr(self, f"_{what}")(which)
        return True

    def die(self, worker: int) -> None:
        self.dead.add(worker)
        self.letters[worker].clear()
        self.busy.pop(worker, None)

    def _may_apply(self, owner: Owner) -> bool:
        """Owners wait for one another before an update, until all have all of a step."""
        step = owner.version
        return all(
            all((step, index) in other.pieces for index in range(self.each))
            and other.rounds[step] == owner.rounds[step]  # they say it with what they wait for
            for other in self.owners
        )

    def _finish(self, worker: int) -> None:
        step, index, attempt, *_ = map(int, self.busy.pop(worker))
        told = Finished(step, index, attempt, 1.0, 1.0, 0.0, refused=False)
        for owner in range(len(self.owners)):
            self.post[worker, owner].append((step, index, attempt))
        self.coordinator.finished(worker, told)

    def _take(self, pair: tuple[int, int]) -> None:
        worker, owner = pair
        key = self.post[pair].popleft()
        self.owners[owner].arrived[key] = worker
        self.owners[owner].judge(key)

    def _lose(self, pair: tuple[int, int]) -> None:
        self.post[pair].clear()

    def _apply(self, number: int) -> None:
        self.owners[number].version += 1
        self.coordinator.applied(number, self.owners[number].version)

    def _hear(self, which: tuple[int, int]) -> None:
        worker, number = which
        owner = self.owners[number]
        owner.heard_of.add(worker)
        if number == 0:
            self.coordinator.lost(worker)
        for recall in [each for each in owner.waiting if each[1] == worker]:
            owner.waiting.remove(recall)
            self._answer(number, recall[0])

    def _answer(self, number: int, key: Key) -> None:
        lacks = key in self.owners[number].verdicts
        self.coordinator.recalled(number, key[0], key[1], lacks=lacks)

    def _read(self, rank: int) -> None:
        kind, numbers = self.letters[rank].popleft()
        if kind is Kind.GRANT:
            self.busy[rank] = numbers
        elif kind in (Kind.ACCEPT, Kind.DISCARD):
            key = int(numbers[0]), int(numbers[1]), int(numbers[2])
            self.owners[rank].verdicts[key] = kind is Kind.ACCEPT
            self.owners[rank].judge(key)
        elif kind is Kind.DROP:
            self.owners[rank].drop((int(numbers[0]), int(numbers[1]), int(numbers[2])))
        elif kind is Kind.RECALL:
            key = int(numbers[0]), int(numbers[1]), int(numbers[2])
            if int(numbers[3]) in self.owners[rank].heard_of:
                self._answer(rank, key)
            else:
                self.owners[rank].waiting.append((key, int(numbers[3])))
        elif kind is Kind.RECORD:
            self._record(rank, Record.of(tuple(numbers)))

    def _record(self, rank: int, record: Record) -> None:
        if rank == 0:
            self.records.append(record)
        if record.is_boundary and not record.lost and record.step + 1 < TOTAL:
            self.coordinator.ready(rank, (record.step + 1, 0, 0))


def run(world: World, deaths: int, after: int) -> None:
    """Until nothing can happen any more; `deaths` workers die at random moments."""
    moments = sorted(world.dice.randrange(after) for _ in range(deaths))
    count = 0
    while world.act():
        count += 1
        if moments and count >= moments[0]:
            moments.pop(0)
            world.die(world.dice.choice([each for each in world.workers if each not in world.dead]))


@pytest.mark.parametrize("seed", range(60))
def test_others_go_on_to_a_boundary_where_all_was_applied_once(seed: int) -> None:
    world = World(seed, owners=1, workers=3)
    run(world, deaths=1 + seed % 2, after=150)
    last = world.records[-1]
    assert last.is_boundary
    assert 1 <= last.lost <= len(world.dead) or last.step + 1 == TOTAL
    assert not any(record.lost for record in world.records[:-1])
    assert world.owners[0].version == last.step + 1
    keys = [(line["step"], line["index"]) for line in world.ledger]
    assert keys == [(step, index) for step in range(last.step + 1) for index in range(3)]
    assert all(0 <= line["staleness"] <= BOUND for line in world.ledger)
    # The ledger names whose contribution it was that was applied.
    applied = world.owners[0].pieces
    assert all(applied[line["step"], line["index"]] == line["worker"] for line in world.ledger)


@pytest.mark.parametrize("seed", range(60))
def test_of_several_owners_all_have_applied_the_same(seed: int) -> None:
    world = World(seed, owners=2 + seed % 2, workers=3)
    run(world, deaths=1, after=150)
    last = world.records[-1]
    assert last.is_boundary
    assert last.lost == 1 or last.step + 1 == TOTAL
    assert {owner.version for owner in world.owners} == {last.step + 1}
    keys = [(line["step"], line["index"]) for line in world.ledger]
    assert keys == [(step, index) for step in range(last.step + 1) for index in range(3)]
    for owner in world.owners:
        for line in world.ledger:
            assert owner.pieces[line["step"], line["index"]] == line["worker"]


def test_without_a_worker_left_there_is_nobody_to_go_on() -> None:
    world = World(0, owners=1, workers=1)
    with pytest.raises(PeerLost, match="no worker is left"):
        run(world, deaths=1, after=2)
