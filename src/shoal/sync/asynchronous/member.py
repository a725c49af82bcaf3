"""One rank of asynchronous SGD: a worker, an owner of a part of the weights, or both.

main thread     next ─▶ load(version) ─▶ (forward, backward) ─▶ finish ─▶ next …
mail's threads  letters in and out, while the main thread computes
owner's thread  pieces ─▶ sum in order ─▶ update ─▶ version k + 1

member.ready(step)
found = member.next(step)          # a `Grant` to work on, or the `Record` of the step
"""

import json
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from shoal.comm import Group, Letter, Mail
from shoal.errors import PeerLost
from shoal.sync.asynchronous.coordinator import Coordinator, Course
from shoal.sync.asynchronous.letters import Finished, Kind, Record
from shoal.sync.asynchronous.roles import Grant, Ledger, Place, Recall
from shoal.sync.asynchronous.shard import Piece

LOOK_ROUND_S = 1.0
KNOWN_WITHIN_S = 5.0  # after a connection has broken, until it is known whose


_Queued = Piece | Recall | None


class Member:
    """This rank, over connections of its own. Collective to make and to close."""

    def __init__(
        self, group: Group, course: Course, place: Place, ledger: Ledger | None = None
    ) -> None:
        self._changed = threading.Condition()
        self._place, self._shard, self.rank = place, place.shard, group.rank
        self._owners = tuple(place.parts)
        self._records: dict[int, Record] = {}
        self._grant: Grant | None = None
        # By owner: versions that have come (None: too old to be had), and what was asked for.
        self._weights: dict[int, dict[int, Tensor | None]] = {each: {} for each in self._owners}
        self._asked: dict[int, set[int]] = {each: set() for each in self._owners}
        self._known = course.first  # the newest version that is there
        # The version of the newest grant, and the one that the main thread loads.
        self._needed = self._loading = -1
        self._loaded: dict[int, Tensor] = {}  # what the model has been given last
        self._works = group.rank in course.workers
        # Of an owner, by step, index and attempt: what waits for the other.
        self._arrived: dict[tuple[int, ...], Piece] = {}
        self._verdicts: dict[tuple[int, ...], bool] = {}
        self._pieces: queue.SimpleQueue[_Queued] = queue.SimpleQueue()
        # An owner's newest version, and who has asked for one that is not there yet.
        self._updated, self._expected = course.first, dict[int, list[int]]()
        # By step and round: by owner, what it has said of whose parts. A step has another round for
        # each contribution to it that was dropped; those are counted as heard of, and as done.
        self._norms: dict[tuple[int, int], dict[int, dict[int, float]]] = {}
        self._dropped, self._rounds = Counter[int](), Counter[int]()
        self.lost: set[int] = set()  # workers that have died
        self._recalls: dict[int, list[Recall]] = {}  # by worker: it may still be heard
        self._met, self._said = 0, defaultdict[int, dict[int, Tensor]](dict)
        self._failure: BaseException | None = None
        self._closing = threading.Event()
        self._clock_since = time.monotonic()
        self.waited_s = 0.0
        self.coordinator: Coordinator | None = None
        if group.rank == 0:
            ledger = ledger or Ledger()
            self.coordinator = Coordinator(course, self._post, ledger.write, ledger.tell)
        self._threads: list[threading.Thread] = []
        self._dtype = dtype = next(iter(place.parts.values())).dtype
        self.mail = Mail(
            group, dtype, self._handle, self._wake, may_lose=course.expendable, lost=self._lose
        )
        self.mail.start()
        if self._shard is not None:
            self._start(self._own)
        if self.coordinator is not None:
            self._start(self._look_round)

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=self._guarded, args=(work,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failure = error
            self._wake()

    # What the main thread does.

    def set_clock(self, seconds: float) -> None:
        """Rank 0 says what its run's clock shows now."""
        self._clock_since = time.monotonic() - seconds

    def ready(self, step: int, *, stop: float = 0.0, save_failed: float = 0.0) -> None:
        """This rank's loop is at `step`: it may be given something to do."""
        self._post(0, Kind.READY, (step, stop, save_failed))

    def next(self, step: int) -> Grant | Record:
        """What comes first: the record of `step`, or a contribution to compute."""
        self._wait(lambda: step in self._records or self._grant is not None)
        with self._changed:
            if step in self._records:
                return self._records.pop(step)
            grant, self._grant = self._grant, None
        assert grant is not None
        return grant

    def load(self, version: int) -> bool:
        """Give the model the weights of a version; False where it is too old to be had."""
        with self._changed:
            self._loading = version
            self._pull(version)
        self._wait(lambda: all(version in self._weights[owner] for owner in self.owners_left))
        with self._changed:
            flats = {owner: self._weights[owner][version] for owner in self.owners_left}
        for owner, flat in flats.items():
            if flat is None:
                return False
            self._loaded[owner] = flat
            self._place.parts[owner].load(flat)
        return True

    def finish(self, grant: Grant, told: Finished, *, has_gradient: bool) -> None:
        """Say that a contribution is done; and ask for the next.

        ``has_gradient``: whether the model has gradients of it, on the version loaded last.
        """
        self._post(0, Kind.FINISHED, told.numbers)
        # Owners have the gradient by the time that they hear whether it counts.
        numbers = grant.step, grant.index, grant.attempt, grant.version, told.count, has_gradient
        for owner in self.owners_left:
            part = self._place.parts[owner]
            gradient = part.gradient(self._loaded[owner]) if has_gradient else None
            self.mail.send(owner, Kind.PIECE, numbers, gradient, "gradient")
        with self._changed:
            # The next version is likely what comes to be worked with: its owners send it at once.
            self._pull(self._known + 1)

    def close(self) -> None:
        """Leave, once nothing is left to do. Collective."""
        self._closing.set()
        self._pieces.put(None)
        for thread in self._threads:
            thread.join()
        self.mail.close()

    def _wait(self, until: Callable[[], object]) -> None:
        began = time.perf_counter()
        with self._changed:
            while not until():
                failure = self._failure or self.mail.failure
                if failure is not None:
                    raise failure
                self._changed.wait()
        self.waited_s += time.perf_counter() - began

    # What other threads do.

    def _post(self, rank: int, kind: Kind, numbers: Any) -> None:
        self.mail.send(rank, kind, numbers)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _handle(self, letter: Letter) -> None:
        with self._changed:
            getattr(self, f"_on_{Kind(letter.kind).name.lower()}")(letter)
            self._changed.notify_all()

    def _coordinating(self) -> Coordinator:
        assert self.coordinator is not None  # only rank 0 is written to as one
        self.coordinator.seconds = time.monotonic() - self._clock_since
        return self.coordinator

    def _on_ready(self, letter: Letter) -> None:
        self._coordinating().ready(letter.source, letter.numbers)

    def _on_finished(self, letter: Letter) -> None:
        self._coordinating().finished(letter.source, Finished.of(letter.numbers))

    def _on_applied(self, letter: Letter) -> None:
        self._coordinating().applied(letter.source, letter.whole(1)[0])

    def _look_round(self) -> None:
        while not self._closing.wait(LOOK_ROUND_S):
            with self._changed:
                self._coordinating().look_round()

    def _on_record(self, letter: Letter) -> None:
        record = Record.of(letter.numbers)
        self._records[record.step] = record
        self._known = record.step + 1
        # Beside what is being computed: a worker that has to wait for it then has it.
        if self._works and not any(self._asked.values()):
            self._pull(self._known)

    def _on_grant(self, letter: Letter) -> None:
        step, index, attempt, version, refused = letter.whole(5)
        self._grant = Grant(step, index, attempt, version, bool(refused))
        self._needed = version
        self._pull(version)  # it is under way before the main thread wakes

    def _pull(self, version: int) -> None:
        for owner in self.owners_left:
            if version not in self._weights[owner] and version not in self._asked[owner]:
                self._asked[owner].add(version)
                self._post(owner, Kind.PULL, (version,))

    def _on_pull(self, letter: Letter) -> None:
        assert self._shard is not None  # only owners are asked
        (version,) = letter.whole(1)
        if version > self._updated:
            self._expected.setdefault(version, []).append(letter.source)
        else:
            self._give(letter.source, version)

    def _give(self, rank: int, version: int) -> None:
        assert self._shard is not None
        flat = self._shard.versions.get(version)
        self.mail.send(rank, Kind.WEIGHTS, (version, flat is not None), flat, "parameter")

    def _on_weights(self, letter: Letter) -> None:
        version, is_there = letter.whole(2)
        self._asked[letter.source].discard(version)
        there = self._weights[letter.source]
        there[version] = letter.payload if is_there else None
        kept = version, self._needed, self._loading
        for other in [each for each in there if each not in kept]:
            del there[other]

    def _on_accept(self, letter: Letter) -> None:
        self._verdict(letter.whole(3), counts=True)

    def _on_discard(self, letter: Letter) -> None:
        self._verdict(letter.whole(3), counts=False)

    def _on_piece(self, letter: Letter) -> None:
        step, index, attempt, version = letter.whole(4)
        piece = Piece(step, index, version, letter.numbers[4], letter.payload)
        self._judge((step, index, attempt), piece, self._verdicts.pop((step, index, attempt), None))

    def _verdict(self, key: tuple[int, ...], *, counts: bool) -> None:
        self._judge(key, self._arrived.pop(key, None), counts)

    def _judge(self, key: tuple[int, ...], piece: Piece | None, counts: bool | None) -> None:
        """A piece counts once it is here and the coordinator has said so, in either order."""
        if piece is None:
            assert counts is not None
            self._verdicts[key] = counts
        elif counts is None:
            self._arrived[key] = piece
        elif counts:
            self._pieces.put(piece)

    def _on_norm(self, letter: Letter) -> None:
        step, number, pairs = letter.whole(3)
        of, squares = letter.numbers[3 : 3 + 2 * pairs : 2], letter.numbers[4 : 3 + 2 * pairs : 2]
        told = {int(owner): square for owner, square in zip(of, squares, strict=True)}
        self._norms.setdefault((step, number), {})[letter.source] = told

    @property
    def owners_left(self) -> tuple[int, ...]:
        """The owners, without those that have died and that others have copies of."""
        return tuple(owner for owner in self._owners if owner not in self.lost)

    def meet(self, value: Any, among: Collection[int]) -> list[Any]:
        """What each of some ranks says, in their order. Collective over these."""
        self._met += 1
        number, data = self._met, torch.tensor(list(json.dumps(value).encode()))
        for rank in among:
            self.mail.send(rank, Kind.MEET, (number,), data.to(self._dtype))
        self._wait(lambda: self.lost.intersection(among) or len(self._said[number]) == len(among))
        said = self._said.pop(number)
        if len(said) < len(among):
            raise PeerLost("another rank has died while those that are left meet")
        return [json.loads(bytes(said[rank].byte().tolist())) for rank in among]

    def _on_meet(self, letter: Letter) -> None:
        assert letter.payload is not None
        self._said[letter.whole(1)[0]][letter.source] = letter.payload

    def _lose(self, rank: int) -> None:
        """A rank that the others go on without has died; all that it had sent was handled."""
        with self._changed:
            self.lost.add(rank)
            self._asked.get(rank, set()).clear()
            for recall in self._recalls.pop(rank, ()):
                self._recall(recall)
            try:
                if self.coordinator is not None:
                    self._coordinating().lost(rank)
            finally:
                self._changed.notify_all()

    def _on_recall(self, letter: Letter) -> None:
        *key, worker = letter.whole(4)
        recall = Recall(*key)
        if worker in self.lost:
            self._recall(recall)
        else:  # this rank has not heard all of it yet
            self._recalls.setdefault(worker, []).append(recall)

    def _recall(self, recall: Recall) -> None:
        # What counts was said before; what has come by then is all that comes.
        lacks = (recall.step, recall.index, recall.attempt) in self._verdicts
        self._post(0, Kind.RECALLED, (recall.step, recall.index, lacks))

    def _on_drop(self, letter: Letter) -> None:
        recall = Recall(*letter.whole(3))
        self._verdicts.pop((recall.step, recall.index, recall.attempt), None)
        self._dropped[recall.step] += 1
        self._pieces.put(recall)  # behind the piece, if that has come

    def _on_recalled(self, letter: Letter) -> None:
        step, index, lacks = letter.whole(3)
        self._coordinating().recalled(letter.source, step, index, lacks=bool(lacks))

    def hear_of(self, lost: int) -> None:
        """Wait until this rank knows, too, of so many that have died."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.lost) >= lost, KNOWN_WITHIN_S)

    def survives(self) -> bool:
        """Whether the others can go on without those that have died; after a connection has broken.

        Waits until it is known who that was.
        """
        with self._changed:
            known = self._changed.wait_for(
                lambda: self.lost or self.mail.failure or self._failure, KNOWN_WITHIN_S
            )
        return bool(known) and self.mail.failure is None and self._failure is None

    def _own(self) -> None:
        """Apply contributions as they come, until the run is over."""
        shard = self._shard
        assert shard is not None
        while (piece := self._pieces.get()) is not None:
            if isinstance(piece, Recall):
                shard.drop(piece.step, piece.index)
                self._rounds[piece.step] += 1
                continue
            shard.add(piece)
            while shard.is_ready:
                squares = shard.sum_up()
                norm = self._norm(shard.version, squares) if self._place.meets else 0.0
                if norm is None:
                    break
                shard.update(norm)
                self._post(0, Kind.APPLIED, (shard.version,))
                self._publish(shard.version)

    def _publish(self, version: int) -> None:
        """Send a new version to all who have asked for it already."""
        with self._changed:
            self._updated = version
            for rank in self._expected.pop(version, ()):
                self._give(rank, version)

    def _norm(self, step: int, squares: Mapping[int, float]) -> float | None:
        """The norm of the whole gradient, from all owners' parts, added up in one order.

        All have all of the step's pieces then. None where a piece is to be dropped. With copies
        each part's norm comes from two, and from one of them once the other has died.
        """
        of = squares if len(squares) > 1 else {self.rank: sum(squares.values())}
        key = step, self._rounds[step]
        pairs = [number for pair in of.items() for number in pair]
        for owner in self.owners_left:
            self._post(owner, Kind.NORM, (*key, len(of), *pairs))
        with self._changed:
            while not all(owner in self._norms.get(key, ()) for owner in self.owners_left):
                if self.mail.failure is not None or self._closing.is_set():
                    raise self.mail.failure or RuntimeError("closed within a step")
                if self._dropped[step] > self._rounds[step]:
                    return None
                self._changed.wait()
            told = self._norms.pop(key)
        by_owner = {owner: square for each in told.values() for owner, square in each.items()}
        return float(sum(by_owner[owner] for owner in sorted(by_owner)) ** 0.5)
