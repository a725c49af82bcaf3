"""Asynchronous SGD as the loop drives it: `step(k)` returns once version k + 1 is there.

    rank 0   step(3) ─ works on 3/0 ─ works on 4/0 ── step(4) ─ works on 5/1 ── step(5) …
    rank 1   step(3) ──────────────── works on 3/1 ── step(4), step(5): there already …

Meanwhile a rank computes what it is given: contributions of this step or of later ones, as far as
the bound allows. The loop's own meetings (an evaluation, a checkpoint, the end) lie at boundaries,
which all ranks reach; see `sync/asynchronous/coordinator.py`. Between them no rank waits for
another's loop.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.checkpoint.meeting import Meeting
from shoal.comm import Pending
from shoal.errors import NotFinite
from shoal.job import Job, ReplicaFeed, local_batch
from shoal.job.owning import kept_by, owners_of, workers_of
from shoal.strategy import Async
from shoal.sync.asynchronous import (
    Course,
    Finished,
    Grant,
    Ledger,
    Member,
    Part,
    Place,
    Record,
    Rules,
    Shard,
    dtype_of,
    kept_tensors,
)
from shoal.train.located import located
from shoal.train.step import Flags, StepResult
from shoal.train.times import Split, StepTimes


@dataclass(frozen=True)
class Plan:
    """When the loop's meetings are, and the ledger to follow, if a run is replayed.

    ``spares``: whether somebody is there to start a new generation of ranks, so that the others go
    on where one dies that holds nothing that is nowhere else.
    """

    boundary_after: Callable[[int], int]
    every_s: float | None = None
    past: Mapping[tuple[int, int], Mapping[str, Any]] | None = None
    spares: bool = False


class Crew:
    """This rank's part. Collective to make, and to close."""

    def __init__(self, job: Job, way: Async, plan: Plan, ledger: Ledger | None = None) -> None:
        self._job = job
        groups, work = job.groups, job.workload
        workers = workers_of(groups, way)
        assert groups.mail is not None  # of an asynchronous strategy
        course = Course(
            first=job.next_step,
            total=work.total_steps,
            bound=way.staleness,
            each=len(workers),
            ranks=groups.world.size,
            workers=workers,
            owners=owners_of(groups, way),
            boundary_after=plan.boundary_after,
            every_s=plan.every_s,
            past=plan.past,
            expendable=way.expendable(groups.world.size) if plan.spares else (),
        )
        self._owners = course.owners
        self.saves = groups.world.rank in course.owners  # whether it has anything to save
        unit = work.normalize_over or 1
        self._feeds = [
            ReplicaFeed(work.feed, index, len(workers), unit) for index in range(len(workers))
        ]
        self._bad: list[Any] = []
        self._begins = True  # all ranks are at the boundary that comes first
        self._stop_told = self._failure_told = False
        self._version = job.next_step
        self.member = Member(groups.mail, course, self._place(way, course), ledger)

    def _place(self, way: Async, course: Course) -> Place:
        job, rank = self._job, self._job.groups.world.rank
        model, held = kept_tensors(job.replica.model), kept_tensors(job.replica.holding)
        dtype = dtype_of(job.replica.model)
        assert job.owned is not None  # dealt out by `assemble`
        parts, owned, owners = {}, job.owned, tuple(course.owners)
        names = {
            owner: [name for name in model if owned[name] in kept_by(owner, owners, way)]
            for owner in owners
        }
        for owner in owners:
            parts[owner] = Part({name: model[name] for name in names[owner]}, dtype)
        shard, clip = None, job.workload.clip_norm
        if rank in owners:
            mine = Part({name: held[name] for name in names[rank]}, dtype)
            of = [owned[name] for name in names[rank] if isinstance(held[name], nn.Parameter)]
            rules = Rules(
                course.each, course.bound, way.compensate, way.damp, clip, of if way.copies else ()
            )
            shard = Shard(mine, job.optimizer, job.set_learning_rate, rules, course.first)
        # So that none has applied what another will never get, as its worker has died.
        meets = len(owners) > 1 and bool(course.expendable)
        return Place(parts, shard, meets or clip is not None)

    def step(self, step: int, flags: Flags, times: StepTimes | None = None) -> StepResult:
        """Work until all of step `step` was applied. As `train_step`, but nobody waits for others.

        Flags are those of all ranks at a boundary, and 0 between two. Raises `NotFinite` where no
        contribution of a step is finite: then it is not one worker's fault.
        """
        counter = self._job.groups.world.counter
        split = Split(times or StepTimes(), counter)
        with located(self._job.groups.world.rank, step):
            self._announce(step, flags)
            while True:
                waited = self.member.waited_s
                found = self.member.next(step)
                counter.waited_s += self.member.waited_s - waited
                if isinstance(found, Record):
                    break
                with located(self._job.groups.world.rank, found.step):
                    self._work(found, split)
            split.book("communication_exposed")
            return self._result(found)

    def _announce(self, step: int, flags: Flags) -> None:
        if self._job.groups.world.rank == 0:
            self.member.set_clock(flags.seconds)
        stop = flags.stop > 0 and not self._stop_told
        failed = flags.save_failed > 0 and not self._failure_told
        if self._begins or stop or failed:
            self._stop_told, self._failure_told = flags.stop > 0, flags.save_failed > 0
            self.member.ready(step, stop=flags.stop, save_failed=flags.save_failed)

    def _result(self, record: Record) -> StepResult:
        self._begins, self._version = record.is_boundary, record.step + 1
        if record.is_boundary:
            self._stop_told = self._failure_told = False
        if record.lost:
            self.member.hear_of(record.lost)
        if record.culprit >= 0:
            raise _nothing_finite(record)
        bad: list[Any] = []
        if record.bad_examples:
            bad, self._bad = self._bad, bad
        loss = record.loss / record.count if record.count else 0.0
        flags = Flags(record.stop, record.seconds, record.bad_examples, record.save_failed)
        rate = self._job.learning_rate(record.step)
        return StepResult(loss, record.count, rate, flags, bad, lost=record.lost > 0)

    def _work(self, grant: Grant, split: Split) -> None:
        """Compute a contribution, and send it on its way."""
        feed, replica, counter = self._feeds[grant.index], self._job.replica, self._job.groups.world
        key = grant.step, grant.index, grant.attempt
        if grant.is_refused or not feed.batch_examples(grant.step):
            nothing = Finished(*key, 0.0, 0.0, 0.0, refused=grant.is_refused)
            self.member.finish(grant, nothing, has_gradient=False)
            return
        waited = self.member.waited_s
        is_there = self.member.load(grant.version)
        counter.counter.waited_s += self.member.waited_s - waited
        if not is_there:  # it was taken back, long ago
            self.member.ready(grant.step)
            return
        split.book("communication_exposed")
        # What comes next nobody knows yet: nothing is read ahead.
        batch, share = local_batch(feed, grant.step, 0, replica, grant.step)
        split.book("input")

        def start(local: Tensor) -> Pending:
            split.book("forward")
            return self._job.agreement.share(local)

        totals = replica.forward_backward(batch, grant.step, share, start)
        loss, count = totals.tolist()
        replica.rescale(count)
        split.book("backward")
        bad = getattr(batch, "bad", ())
        self._bad += bad
        finite = math.isfinite(loss) and _finite_gradient(self._job)
        told = Finished(*key, loss, count, float(len(bad)), refused=not finite)
        self.member.finish(grant, told, has_gradient=finite)
        for parameter in replica.model.parameters():
            parameter.grad = None
        split.book("optimizer")

    def settle(self) -> None:
        """At a boundary: let the model have the version that is there. Collective."""
        self.member.load(self._version)

    def meeting(self) -> Meeting | None:
        """How owners meet to save, where one of them has died."""
        has_lost_owner = any(owner in self.member.lost for owner in self._owners)
        return _OwnersLeft(self.member) if has_lost_owner else None

    def survives(self) -> bool:
        """Whether the others go on where a connection has broken: it was to a spare worker."""
        return self.member.survives()

    def close(self) -> None:
        """Leave, at the last boundary. Collective."""
        self.member.close()
        for collective, purposes in self.member.mail.counter.as_dict().items():
            for purpose, count in purposes.items():
                self._job.groups.world.counter.add(collective, purpose, count)  # type: ignore[arg-type]

    @property
    def counts(self) -> dict[str, int]:
        """On rank 0: contributions that were refused, and claims that were taken back."""
        coordinator = self.member.coordinator
        if coordinator is None:
            return {}
        return {"refused": coordinator.refused, "taken_back": coordinator.taken_back}


class _OwnersLeft:
    """The owners that are left, as a checkpoint's meeting."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self._among = member.owners_left
        self.rank, self.size = self._among.index(member.rank), len(self._among)

    def all_gather_json(self, value: Any) -> list[Any]:
        return self._member.meet(value, self._among)


def _finite_gradient(job: Job) -> bool:
    gradients = [p.grad for p in job.replica.model.parameters() if p.grad is not None]
    # One question for all: asking each tensor costs half a millisecond.
    norms = torch._foreach_norm(gradients)
    return not norms or bool(torch.isfinite(torch.stack(norms)).all())


def _nothing_finite(record: Record) -> NotFinite:
    return NotFinite(
        f"no contribution to step {record.step} is finite",
        hint="One worker's would have been left out; when none is left, the model has diverged. "
        "Checkpoints made before are good. Try a smaller optimizer.lr, a schedule with warmup, or "
        "optimizer.clip_norm.",
        rank=record.culprit,
        step=record.step,
        phase="loss",
    )
