"""Rank 0's part: hands out claims, says which version is there, keeps the ledger.

    READY, FINISHED ─▶ [ claims ] ─ GRANT ─▶ …            APPLIED of all owners ─▶ RECORD to all

A *boundary* is a step that no contribution is given out beyond before all ranks' loops have come
there: where the model is evaluated or saved, and, soon after a rank asks for it, where a run ends.
Between two boundaries ranks do not wait for one another but for the bound. At one everything is at
rest: all contributions of earlier steps were applied, and none of a later one is begun.

A worker that owns nothing may die: what it held returns to the pool, what it had finished and may
not have sent is recalled from the owners, and the others go on to the next boundary, whose record
says so.

No threads, no clock of its own: `Member` calls it under a lock, and says what time it is.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import PeerLost
from shoal.sync.asynchronous.letters import Finished, Kind, Record
from shoal.sync.claims import Claim, Claims

PATIENCE_S = 3.0  # a claim that is held for longer, and for long beside others, is taken back
PATIENCE_TIMES = 10.0
WORTH_WAITING = 0.1  # of a contribution's time, for an update that is about to come
RECENT = 0.2  # the weight of the newest in a running mean


@dataclass(frozen=True)
class Course:
    """A run, as far as the coordinator has to know it.

    ``boundary_after(step)``: the next one that is planned; ``every_s``: seconds after which there
    is one at the latest, where something is due by the clock. ``past``: the ledger that the run
    follows, by (step, index), for a replay. ``expendable``: ranks without which the others go on.
    """

    first: int
    total: int
    bound: int
    each: int
    ranks: int
    workers: Sequence[int]
    owners: Sequence[int]
    boundary_after: Callable[[int], int]
    every_s: float | None = None
    past: Mapping[tuple[int, int], Mapping[str, Any]] | None = None
    expendable: Collection[int] = ()


@dataclass
class Told:
    """What is known of the contributions of a step that is not there yet."""

    finished: dict[int, tuple[Claim, Finished]] = field(default_factory=dict)
    since: float = 0.0  # when the last of them was finished


class Coordinator:
    """``send(rank, kind, numbers)`` posts a letter; ``write(line)`` adds one to the ledger."""

    def __init__(
        self,
        course: Course,
        send: Callable[[int, Kind, Sequence[float]], None],
        write: Callable[[dict[str, Any]], None],
        tell: Callable[[str, str, int, int], None],
    ) -> None:
        self._course, self._send, self._write, self._tell = course, send, write, tell
        self._past = course.past or {}
        bases = {key: int(line["computed_on"]) for key, line in self._past.items()}
        self.claims = Claims(
            course.each,
            course.bound,
            course.first,
            limit=min(course.total, course.boundary_after(course.first)),
            computed_on=bases if course.past is not None else None,
        )
        self._at = dict.fromkeys(range(course.ranks), -1)
        self._applied = dict.fromkeys(course.owners, course.first)
        self._free: list[int] = []
        self._since: dict[tuple[int, int], float] = {}
        self._longest = 0.0
        # Running means: of a contribution, and of an update since its last one was finished.
        self._work_s = self._update_s = 0.0
        self._steps: dict[int, Told] = {}
        self._overdue: dict[int, Claim] = {}  # by worker: taken back, and nothing heard since
        self._lost: set[int] = set()
        self._recalled: dict[tuple[int, int], dict[int, bool]] = {}  # by owner: does it lack it?
        self._stop = self._failed = self._bad = 0.0
        self._published = 0.0  # when the newest version was told of
        self._seconds_told: float | None = None  # rank 0's clock at the last boundary
        self.seconds = 0.0  # rank 0's clock, set by whoever calls
        self.refused = 0
        self.taken_back = 0

    def ready(self, rank: int, numbers: Sequence[float]) -> None:
        """A rank's loop has come to a step, and may do something."""
        step, stop, failed = numbers[:3]
        if self._seconds_told is None:
            self._seconds_told = self.seconds
        self._at[rank] = max(self._at[rank], int(step))
        self._stop, self._failed = max(self._stop, stop), max(self._failed, failed)
        self._woke(rank)
        self._ask(rank)
        self._open_boundary()
        self.dispatch()

    def _open_boundary(self) -> None:
        """Let the next steps begin, once all ranks' loops have come to the boundary."""
        limit = self.claims.limit
        if limit is not None and all(at >= limit for at in self._at.values()):
            self.claims.limit = min(self._course.total, self._course.boundary_after(limit))

    def _woke(self, rank: int) -> None:
        """A worker whose claim was taken back is heard of again."""
        claim = self._overdue.pop(rank, None)
        if claim is not None:
            self._tell("discarded", "its claim was taken back meanwhile", rank, claim.step)

    def _ask(self, rank: int) -> None:
        holds = any(claim.worker == rank for claim in self.claims.held.values())
        if rank in self._course.workers and rank not in self._free and not holds:
            self._free.append(rank)

    def finished(self, rank: int, told: Finished) -> None:
        """A worker has computed a contribution: it counts, unless its claim was taken back."""
        claim = self.claims.held.get((told.step, told.index))
        answer = told.step, told.index, told.attempt
        mine = claim is not None and (claim.worker, claim.attempt) == (rank, told.attempt)
        if claim is None or not mine or not self.claims.finish(claim):
            self._woke(rank)
            self._send_owners(Kind.DISCARD, answer)
        else:
            took = self.seconds - self._since.pop(claim.key)
            self._longest = max(self._longest, took)
            self._work_s += RECENT * (took - self._work_s)
            of_step = self._steps.setdefault(told.step, Told())
            of_step.finished[told.index] = claim, told
            of_step.since = self.seconds
            self._bad += told.bad_examples
            if told.refused:
                self.refused += 1
                message = "a contribution that is not finite was refused; the others count"
                self._tell("refused", message, rank, told.step)
            self._send_owners(Kind.ACCEPT, answer)
        self._ask(rank)
        self.dispatch()

    def _send_owners(self, kind: Kind, numbers: Sequence[float]) -> None:
        for owner in self._course.owners:
            self._send(owner, kind, numbers)

    def applied(self, owner: int, version: int) -> None:
        """An owner has a new version; once all have it, it is there for everybody."""
        self._applied[owner] = version
        self._advance()
        self.dispatch()

    def _advance(self) -> None:
        there = min(self._applied.values())
        while self.claims.version < there:
            step = self.claims.version
            self.claims.advance(step + 1)
            self._bring_limit()
            self._publish(step)

    def _bring_limit(self) -> None:
        """The next boundary is as near as can be, where a rank waits for one."""
        every, claims = self._course.every_s, self.claims
        due = every is not None and self.seconds - (self._seconds_told or 0.0) >= every
        # Another owner's death might be one too many.
        alone = len(self._applied) < len(self._course.owners)
        if self._stop or self._failed or due or alone:
            # Of what is claimed already, and of the step that all know of, it is too late.
            nearest = max(claims.begun, claims.version)
            claims.limit = min(claims.limit or nearest, nearest)

    def _publish(self, step: int) -> None:
        of_step = self._steps.pop(step)
        told, since = of_step.finished, max(of_step.since, self._published)
        self._update_s += RECENT * (self.seconds - since - self._update_s)
        self._published = self.seconds
        for index in range(self._course.each):
            claim, finished = told[index]
            line = {"step": step, "index": index, "worker": claim.worker}
            line |= {"computed_on": claim.version, "applied_at": step}
            line |= {"staleness": claim.staleness}
            self._write({**line, "refused": True} if finished.refused else line)
        kept = [each for _, each in told.values() if not each.refused]
        refused = [claim.worker for claim, each in told.values() if each.refused]
        boundary = step + 1 == self.claims.limit
        by_clock = self._course.every_s is not None
        if boundary or not by_clock:
            self._seconds_told = self.seconds
        record = Record(
            step,
            sum(each.loss for each in kept),
            sum(each.count for each in kept),
            self._stop if boundary else 0.0,
            # What is due by the clock has to be due at a boundary.
            self._seconds_told or 0.0,
            self._bad if boundary else 0.0,
            self._failed if boundary else 0.0,
            boundary,
            min(refused) if refused and not any(each.count for each in kept) else -1,
            len(self._lost) if boundary else 0,
        )
        if boundary:
            self._stop = self._failed = self._bad = 0.0
        for rank in range(self._course.ranks):
            self._send(rank, Kind.RECORD, record.numbers)

    def dispatch(self) -> None:
        """Hand out what may be started.

        Not while all of a step is done and only its update is to come, if updates come within a
        small part of a contribution's time: a worker then gets a gradient that is a step fresher.
        On a slow network, where the gradient itself has to arrive first, nobody waits for it.
        """
        while self._free and not self._is_update_due():
            claim = self.claims.claim(self._free[0])
            if claim is None:
                return
            self._free.pop(0)
            self._since[claim.key] = self.seconds
            refused = bool(self._past.get(claim.key, {}).get("refused"))
            numbers = claim.step, claim.index, claim.attempt, claim.version, refused
            self._send(claim.worker, Kind.GRANT, numbers)

    def _is_update_due(self) -> bool:
        told = self._steps.get(self.claims.version)
        due = told is not None and len(told.finished) == self._course.each
        return due and self._update_s <= WORTH_WAITING * self._work_s

    def look_round(self) -> None:
        """Now and then: take back what is held for far longer than others have needed."""
        patience = max(PATIENCE_S, PATIENCE_TIMES * self._longest)
        if not self._free or not self._longest:
            return
        overdue = [
            claim
            for claim in self.claims.held.values()
            if self.seconds - self._since[claim.key] > patience
        ]
        for claim in sorted(overdue, key=lambda each: each.key)[: len(self._free)]:
            self.claims.take_back(claim)
            self.taken_back += 1
            self._overdue[claim.worker] = claim
            message = f"nothing was heard of a claim for {patience:.0f} s: another takes it"
            self._tell("taken back", message, claim.worker, claim.step)
        self.dispatch()

    def lost(self, rank: int) -> None:
        """A worker has died: the others do what it has begun, and go on to the next boundary.

        Where it was an owner, another has a copy of its part, and the boundary is as near as can
        be. Raises `PeerLost` where no worker is left, or no copy.
        """
        self._lost.add(rank)
        self._at.pop(rank, None)
        if rank in self._free:
            self._free.remove(rank)
        if self._lost.issuperset(self._course.workers):
            raise PeerLost("no worker is left")
        owners = list(self._course.owners)
        if rank in owners:
            near = owners[owners.index(rank) - 1], owners[(owners.index(rank) + 1) % len(owners)]
            if self._lost.intersection(near):
                raise PeerLost("a part of the weights has gone, and its copy")
            del self._applied[rank]
        left = len(set(self._course.workers) - self._lost)
        message = (
            "its process has gone: the others do what it had begun, up to the next evaluation or "
            f"checkpoint, where it rejoins (workers that go on: {left})"
        )
        self._tell("lost", message, rank, self.claims.version)
        for claim in [each for each in self.claims.held.values() if each.worker == rank]:
            self.claims.take_back(claim)
            self.taken_back += 1
        # Finished and counted, but did its pieces reach all owners before it died?
        for step, told in self._steps.items():
            for index, (claim, _) in told.finished.items():
                if claim.worker == rank:
                    self._recalled[step, index] = {}
                    self._send_owners(Kind.RECALL, (step, index, claim.attempt, rank))
        for key, answers in list(self._recalled.items()):
            answers.pop(rank, None)
            self._decide(key)
        self._advance()
        self._open_boundary()
        self.dispatch()

    def recalled(self, owner: int, step: int, index: int, *, lacks: bool) -> None:
        """An owner has a dead worker's piece, or will never get it."""
        self._recalled[step, index][owner] = lacks
        self._decide((step, index))
        self.dispatch()

    def _decide(self, key: tuple[int, int]) -> None:
        """Once all owners have answered: whether a dead worker's contribution is to be redone."""
        answers, (step, index) = self._recalled[key], key
        if len(answers) < len(self._applied):
            return
        del self._recalled[key]
        if not any(answers.values()):
            return
        # No owner has applied it: they wait for one another before an update.
        claim, told = self._steps[step].finished.pop(index)
        self._bad -= told.bad_examples
        self.refused -= told.refused
        self._send_owners(Kind.DROP, (*claim.key, claim.attempt))
        self.claims.reopen(claim)
        self.taken_back += 1
