"""What one rank trains, as the loop sees it: one job, or the members of an ensemble dealt to it.

    team = Team.of(groups, workload, execution, state, look)
    team.step(step, flags, times)
    team.evaluate().metrics                  # of members: their mean, and each one's beside

members 0 1 2 3 4 on two replicas            replica 0: 0 2 4      replica 1: 1 3
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from torch import nn

from shoal.checkpoint import Checkpoint, Snapshot, replicas
from shoal.checkpoint.meeting import Meeting
from shoal.comm import Groups
from shoal.data import Member, MemberFeed
from shoal.errors import Refused
from shoal.job import Execution, Job, Workload, assemble
from shoal.predict import Evaluation, evaluate
from shoal.strategy import Agreement, Compress, Solo
from shoal.train.apart import apart_step
from shoal.train.crew import Crew
from shoal.train.snapshot import snapshot_of
from shoal.train.step import Flags, StepResult, train_step
from shoal.train.times import StepTimes

Look = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class Team:
    """The jobs of this rank, the numbers of their replicas, and how many there are in all."""

    jobs: tuple[Job, ...]
    numbers: tuple[int, ...] = (0,)
    replicas: int = 1
    agreement: Agreement | None = None
    crew: Crew | None = None  # of asynchronous SGD
    compress: Compress | None = None  # what is done to what replicas send

    @classmethod
    def of(
        cls,
        groups: Groups,
        workload: Workload,
        execution: Execution,
        state: Checkpoint | None,
        look: Look,
        of_member: Callable[[int], Workload] | None = None,
    ) -> "Team":
        """Assemble this rank's jobs. Collective. ``look`` gets each plain model and its number.

        ``of_member``: the workload of each member, where they are unlike.
        """
        way, between = execution.agreement, groups.between
        if not way.apart:
            whole = _whole(state)
            return cls((assemble(groups, workload, execution, whole, lambda m: look(0, m)),))
        of = way.members or between.size if isinstance(way, Solo) else between.size
        numbers = tuple(range(between.rank, of, between.size))
        jobs = []
        for number in numbers:
            part = workload if of_member is None else of_member(number)
            if isinstance(way, Solo):
                part = _own(replace(part, feed=workload.feed), way, number)
            own = _one(state, execution, number, of)
            job = assemble(groups, part, execution, own, lambda m, n=number: look(n, m))  # type: ignore[misc]
            if isinstance(way, Solo):
                member = Member(number, of, way.full, workload.normalize_over or 1)
                recipes: Any = workload.feed  # solo is for recipes, whose feeds are `data.Feed`s
                job.feed = MemberFeed(recipes, member)
            jobs.append(job)
        return cls(tuple(jobs), numbers, of, way, compress=execution.compress)

    @property
    def job(self) -> Job:
        """The first: what is the same for all is asked of it."""
        return self.jobs[0]

    @property
    def is_apart(self) -> bool:
        """Whether replicas have weights of their own."""
        return self.agreement is not None

    @property
    def holdings(self) -> Sequence[nn.Module]:
        """The modules whose tensors this rank keeps."""
        return [job.replica.holding for job in self.jobs]

    def step(self, step: int, flags: Flags, times: StepTimes) -> StepResult:
        """Do a training step. Collective."""
        if self.crew is not None:
            return self.crew.step(step, flags, times)
        if self.is_apart:
            return apart_step(self.jobs, step, flags, times)
        return train_step(self.job, step, flags, times)

    def evaluate(self) -> Evaluation:
        """Loss and metrics of the model; of members their mean. Collective."""
        if isinstance(self.agreement, Solo):
            return self._evaluate_members()
        if self.crew is not None:
            self.crew.settle()
        meetings, replica = self.job.meetings, self.job.replica
        if meetings is None:
            return evaluate(self.job)
        with meetings.settled():
            replica.updated()
            found = evaluate(self.job)
        replica.updated()
        return found

    @property
    def saves(self) -> bool:
        """Whether this rank has a part in checkpoints."""
        return self.crew is None or self.crew.saves

    def meeting(self) -> Meeting | None:
        """How those meet that save, where it is not as always: one of them has died."""
        return None if self.crew is None else self.crew.meeting()

    def survives(self) -> bool:
        """Whether those that are left can save what there is, after a connection has broken."""
        return self.crew is not None and self.crew.survives()

    def close(self) -> None:
        """After the last step: end what went on beside it. Collective."""
        if self.crew is not None:
            self.crew.close()

    def _evaluate_members(self) -> Evaluation:
        group = self.job.groups.within.world
        found = [evaluate(job, group) for job in self.jobs]
        said = [[number, one.metrics] for number, one in zip(self.numbers, found, strict=True)]
        everywhere = self.job.groups.world.all_gather_json(said, "evaluation")
        by_number = {number: metrics for of_rank in everywhere for number, metrics in of_rank}
        members = tuple(by_number[number] for number in range(self.replicas))
        mean = {key: fmean(one[key] for one in members) for key in members[0]}
        return Evaluation(mean, tuple(bad for one in found for bad in one.bad), members)

    def snapshot(
        self, step: int, fingerprint: str, strategy: str, train: dict[str, Any]
    ) -> Snapshot:
        """What this rank holds after `step` steps. Collective where replicas are apart."""
        if not self.is_apart:
            return snapshot_of(self.job, step, fingerprint, strategy, train)
        own = [snapshot_of(job, step, fingerprint, strategy, train) for job in self.jobs]
        starts = [replicas.prefix(number) for number in self.numbers]
        options = {
            start.rstrip("/"): each.optimizer for start, each in zip(starts, own, strict=True)
        }
        everywhere = self.job.groups.world.all_gather_json(options, "checkpoint")
        return replace(
            own[0],
            tensors=_prefixed(
                (start, each.tensors) for start, each in zip(starts, own, strict=True)
            ),
            aliases={
                start + alias: start + name
                for start, each in zip(starts, own, strict=True)
                for alias, name in each.aliases.items()
            },
            optimizer={name: value for of_rank in everywhere for name, value in of_rank.items()},
            sync={
                "replicas": self.replicas,
                "agreement": str(self.agreement),
                "compress": str(self.compress or ""),
            },
        )


def _prefixed(parts: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {start + name: value for start, tensors in parts for name, value in tensors.items()}


def _own(workload: Workload, way: Solo, number: int) -> Workload:
    """A member's workload: with weights of its own where that was asked for."""
    if way.init == "same":
        return workload
    return replace(workload, initial_seed=workload.seed + number)


def _whole(state: Checkpoint | None) -> Checkpoint | None:
    """One set of weights: of replicas that had weights of their own, their mean."""
    if state is None or not replicas.count(state):
        return state
    _refuse_solo(state)
    return replicas.Mean.of(state)


def _one(state: Checkpoint | None, execution: Execution, number: int, of: int) -> Checkpoint | None:
    """What replica `number` goes on from.

    Its own weights only under the agreement that they were saved under: another one takes it that
    replicas are equal when it begins (outer weights, a centre, what was last sent).
    """
    if state is None:
        return None
    way, held = execution.agreement, replicas.count(state)
    said = state.manifest.sync or {}
    begun = said.get("agreement"), said.get("compress", "")
    same = begun == (str(way), str(execution.compress or ""))
    if held == of and (same or isinstance(way, Solo)):
        return replicas.one_of(state, number)
    if isinstance(way, Solo):
        raise Refused(
            f"this run holds {held or 'no'} members, and {way} has {of}: they never meet, so none "
            "can be made of others",
            hint="Resume with the strategy that the run was begun with.",
        )
    return _whole(state)


def _refuse_solo(state: Checkpoint) -> None:
    said = str(state.manifest.sync.get("agreement", ""))
    if said.startswith(Solo.name):
        raise Refused(
            f"this run holds {replicas.count(state)} models that were trained apart ({said}), and "
            "they cannot be gone on with as one",
            hint="Resume with its own strategy; `shoal predict --how mean` merges them.",
        )
