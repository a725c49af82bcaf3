"""One rank's part of a verification."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from shoal.comm import Groups, peer_failures
from shoal.errors import NotFinite, RunError
from shoal.job import Execution, Job, Workload, assemble, share_of, workload_of
from shoal.launch import Context
from shoal.layout import Part
from shoal.recipe import Component, Recipe
from shoal.strategy import Strategy
from shoal.train.agree_start import compare as compare_start
from shoal.train.agree_start import describe_parameters
from shoal.verify.causes import likely_cause
from shoal.verify.certificate import KINDS, Difference
from shoal.verify.compare import (
    Comparison,
    Held,
    first_of_all,
    require_all_held,
    share_record,
)
from shoal.verify.evidence import Evidence, gather_ranks
from shoal.verify.feeds import FunctionFeed, VerifyingFeed
from shoal.verify.moved import Finding, Move
from shoal.verify.observed import Observed
from shoal.verify.precision import Precision, Yardstick
from shoal.verify.record import Record
from shoal.verify.reference import Reference
from shoal.verify.throughout import Float64Throughout


@dataclass(frozen=True)
class Functions:
    """A workload that a user gives as functions."""

    model_fn: Callable[[], Any]
    batch_fn: Callable[[int], Any]
    loss_fn: Callable[[Any, Any], Any]
    weight_fn: Callable[[Any], Any] | None
    optimizer: Component
    normalize_over: int | None = None


@dataclass(frozen=True)
class VerifyTask:
    """What every rank is told."""

    work: Functions | dict[str, Any]  # or a recipe as a dict
    strategy: str
    steps: int
    # Tests plant a bug on the ranks with it: entered before anything is assembled.
    plant: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    dtype: str = "float64"  # or float32, bfloat16: see `precision`


def verify_on_rank(context: Context, task: VerifyTask) -> dict[str, Any]:
    """Train and compare; the certificate's findings, equal on all ranks. Collective."""
    torch.set_num_threads(context.threads)
    strategy = Strategy.parse(task.strategy)
    groups = Groups.form(
        context.rank,
        context.world_size,
        context.store,
        context.generation,
        axes=strategy.axes,
        shards=strategy.shards,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(peer_failures())
        if Precision(task.dtype).is_full:
            stack.enter_context(Float64Throughout())
        workload = _workload(task, groups.data.size)
        execution = Execution.of(strategy, Precision(task.dtype).dtype)
        # One device, and not yet touched by whatever is planted on the ranks.
        one = OneDevice.of(workload, Precision(task.dtype), groups)
        stack.enter_context(task.plant())
        start: dict[str, Any] = {"data": workload.feed.fingerprint}
        job = assemble(
            groups,
            workload,
            execution,
            look=lambda model: start.update(parameters=describe_parameters(model)),
        )
        compare_start(groups.world, start)
        findings = _Verification(job, execution, strategy, one).run(task.steps)
    groups.close()
    return findings


@dataclass(frozen=True)
class OneDevice:
    """One device's steps: in float64, and where the ranks compute in less, in that as well.

    On rank 0; the other ranks have none.
    """

    right: Reference | None = None
    low: Reference | None = None
    yardstick: Yardstick | None = None

    @classmethod
    def of(cls, workload: Workload, precision: Precision, groups: Groups) -> "OneDevice":
        if groups.world.rank:
            return cls()
        right = Reference(workload, groups.device)
        if precision.is_full:
            return cls(right)
        return cls(right, Reference(workload, groups.device, precision), Yardstick(precision))

    def step(self, step: int) -> Record | None:
        """What one device leaves after this step, in float64, with what ranks are allowed."""
        if self.right is None:
            return None
        record = self.right.step(step)
        if self.low is not None and self.yardstick is not None:
            self.yardstick.measure(self.low.step(step, record), record)
        return record


class _Verification:
    """One rank's steps beside one device's."""

    def __init__(self, job: Job, execution: Execution, strategy: Strategy, one: OneDevice) -> None:
        self.job = job
        self.execution = execution
        self.strategy = strategy
        self.one = one
        self.world = job.groups.world
        self.comparison = Comparison()
        self.cause: str | None = None

    def run(self, steps: int) -> dict[str, Any]:
        """Do the steps, move a checkpoint; the findings."""
        observed, moved, theirs = Observed(self.job), None, Record()
        for step in range(steps):
            theirs = share_record(self.world, self.one.step(step))
            _refuse_not_finite(step, theirs)
            try:
                mine = observed.step(step, theirs)
            except NotFinite as error:  # on all ranks alike, and not on one device
                self.comparison.lose(step)
                self.cause = f"the ranks have no finite loss where one device has: {error.message}"
                break
            self._compare(step, mine, theirs)
        if first_of_all(self.world, self.comparison) is None:
            moved = self._move(steps, theirs)
        return self._findings(moved)

    def _compare(self, step: int, mine: Record, theirs: Record) -> None:
        job = self.job
        examples = job.workload.feed.batch_examples(step)
        shares = share_of(examples, job.groups.data.size, job.replica.unit).shares
        held = _held(job, shares, examples)
        if step == 0:
            require_all_held(self.world, held.layout, theirs)
        self.comparison.add(step, mine, theirs, held)
        if self.cause is None:
            first = first_of_all(self.world, self.comparison)
            if first is not None:
                self.cause = self._find_cause(first, mine, theirs, held, shares)

    def _find_cause(
        self,
        first: Difference,
        mine: Record,
        theirs: Record,
        held: Held,
        shares: tuple[tuple[int, int], ...],
    ) -> str:
        ranks, cause = gather_ranks(self.job.groups, mine, held), None
        if self.one.right is not None:
            degrees = {axis: self.strategy.degree(axis) for axis in ("pp", "dp", "tp")}
            cause = likely_cause(
                Evidence(
                    self.one.right,
                    first,
                    theirs,
                    ranks,
                    shares,
                    degrees,
                    self.strategy.microbatches,
                )
            )
        return str(self.world.all_gather_json(cause, "evaluation")[0])

    def _move(self, steps: int, theirs: Record) -> Finding:
        job, share = self.job, (0, 0)
        held = Held(_layout(job), share, 0)
        reference = self.one.low or self.one.right
        move = Move(job, self.execution, held, steps, str(self.strategy), reference)
        found = move.check(theirs)
        if found.first is not None:
            self.comparison.first, self.cause = found.first, found.cause
        return found

    def _findings(self, moved: Finding | None) -> dict[str, Any]:
        own = self.comparison
        said = {"errors": own.max_error, "of_allowed": own.of_allowed}
        everywhere = self.world.all_gather_json(said, "evaluation")

        def largest(*kinds: str) -> float | None:
            found = [each["errors"][k] for each in everywhere for k in kinds if k in each["errors"]]
            return max(found, default=None)

        yardstick = self.one.yardstick
        one_device = None if yardstick is None else yardstick.by_kind()
        first = first_of_all(self.world, own)
        describe = getattr(self.job.replica, "describe", list)
        return {
            "max_error": {
                kind: largest(kind, "clipped") if kind == "gradient" else largest(kind)
                for kind in KINDS
            },
            "gradient_norm": largest("gradient_norm"),
            "first_difference": first.to_json() if first is not None else None,
            "cause": self.cause,
            "checkpoint": None if moved is None else vars(moved.moved),
            "one_device": self.world.all_gather_json(one_device, "evaluation")[0],
            "of_allowed": max(each["of_allowed"] for each in everywhere),
            "split": [str(line) for line in describe()],
        }


def _held(job: Job, shares: tuple[tuple[int, int], ...], examples: int) -> Held:
    share = shares[job.groups.data.rank]
    return Held(_layout(job), share, examples, outputs=job.replica.captured is not None)


def _layout(job: Job) -> dict[str, Part]:
    """The replica's layout, and buffers that no checkpoint has: each rank made them, whole."""
    buffers = job.replica.holding.named_buffers()
    made = {name: Part.whole(tuple(buffer.shape)) for name, buffer in buffers}
    return made | job.replica.layout


def _workload(task: VerifyTask, ranks: int) -> Workload:
    """The workload with batches that verification needs, at a constant learning rate.

    Constant, since a warm-up begins at zero: weights that do not move prove nothing.
    """
    if isinstance(task.work, Functions):
        workload = _of_functions(task.work, task.steps)
    else:
        workload = workload_of(Recipe.from_dict(task.work))
    return replace(
        workload,
        feed=VerifyingFeed(workload.feed, task.steps, ranks, workload.normalize_over),
        schedule=lambda _share: 1.0,
        total_steps=task.steps,
        evaluation=None,
    )


def _of_functions(functions: Functions, steps: int) -> Workload:
    from shoal import learn

    return Workload(
        build_model=functions.model_fn,
        objective=learn.UsersObjective("loss_fn", functions.loss_fn, weight_fn=functions.weight_fn),
        build_optimizer=lambda model: learn.build_optimizer(functions.optimizer, model),
        schedule=lambda _share: 1.0,
        feed=FunctionFeed(functions.batch_fn, steps),
        seed=0,
        total_steps=steps,
        clip_norm=learn.clip_norm_of(functions.optimizer),
        normalize_over=functions.normalize_over,
    )


def _refuse_not_finite(step: int, theirs: Record) -> None:
    """Nothing can be said where one device itself has no finite numbers."""
    for kind, tensors in theirs.tensors.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"{kind} {name} is not finite on one device either: nothing can be compared",
                    step=step,
                )
