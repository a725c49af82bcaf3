"""One rank's part of a verification."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from shoal.comm import Group, Groups, peer_failures
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
    ORDER,
    Comparison,
    Held,
    cause_between_ranks,
    require_all_held,
    share_reference,
)
from shoal.verify.feeds import FunctionFeed, VerifyingFeed
from shoal.verify.observed import Observed
from shoal.verify.record import Record
from shoal.verify.reference import Reference
from shoal.verify.throughout import Float64Throughout

DTYPE = torch.float64


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
        stack.enter_context(Float64Throughout())
        workload = _workload(task, groups.data.size)
        if groups.world.rank == 0:
            # One device, and not yet touched by whatever is planted on the ranks.
            reference = Reference(workload, DTYPE, groups.device)
            records = reference.steps(task.steps)
        stack.enter_context(task.plant())
        start: dict[str, Any] = {"data": workload.feed.fingerprint}
        job = assemble(
            groups,
            workload,
            Execution.of(strategy, DTYPE),
            look=lambda model: start.update(parameters=describe_parameters(model)),
        )
        compare_start(groups.world, start)
        observed, comparison, cause = Observed(job), Comparison.empty(), None
        for step in range(task.steps):
            record = next(records) if groups.world.rank == 0 else None
            theirs = share_reference(groups.world, record)
            _refuse_not_finite(step, theirs)
            try:
                mine = observed.step(step, theirs)
            except NotFinite as error:  # on all ranks alike, and not on one device
                comparison.lose(step)
                cause = f"the ranks have no finite loss where one device has: {error.message}"
                break
            examples = workload.feed.batch_examples(step)
            shares = share_of(examples, groups.data.size, job.replica.unit).shares
            if step == 0:
                require_all_held(groups.world, _layout(job), theirs)
            comparison.add(step, mine, theirs, _held(job, shares, examples))
            first = _first(groups.world, comparison)
            if first is not None and cause is None:
                layout = job.replica.layout
                cause = cause_between_ranks(groups.world, first, mine, theirs, layout)
                if cause is None and groups.world.rank == 0:
                    cause = likely_cause(reference, first, mine, theirs, shares)
                cause = groups.world.all_gather_json(cause, "evaluation")[0]
        findings = _findings(groups.world, comparison, cause)
    groups.close()
    return findings


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
    for kind in KINDS:
        for name, tensor in theirs.tensors[kind].items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise RunError(
                    f"{kind} {name} is not finite on one device either: nothing can be compared",
                    step=step,
                )


def _first(group: Group, comparison: Comparison) -> Difference | None:
    """The first difference on any rank: the earliest step, then what is computed first."""
    own = comparison.first.to_json() if comparison.first is not None else None
    found = [each for each in group.all_gather_json(own, "evaluation") if each is not None]
    return Difference(**min(found, key=_when)) if found else None


def _when(difference: dict[str, Any]) -> tuple[int, int]:
    return difference["step"], ORDER.index(difference["kind"])


def _findings(group: Group, comparison: Comparison, cause: str | None) -> dict[str, Any]:
    everywhere = group.all_gather_json({"errors": comparison.max_error}, "evaluation")
    first = _first(group, comparison)
    return {
        "max_error": {
            kind: max(
                (each["errors"][kind] for each in everywhere if kind in each["errors"]),
                default=None,
            )
            for kind in KINDS
        },
        "first_difference": first.to_json() if first is not None else None,
        "cause": cause,
    }
