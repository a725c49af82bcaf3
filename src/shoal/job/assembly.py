"""`assemble`: replica, agreement and optimizer from a generation of ranks and a state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from shoal import learn
from shoal.checkpoint import Checkpoint
from shoal.checkpoint.optimizer_state import restore
from shoal.comm import Groups
from shoal.errors import Refused
from shoal.job.owning import share_out
from shoal.job.sharing import Feed, ReplicaFeed, shares
from shoal.job.workload import Execution, Workload, local_batch
from shoal.layout import Part
from shoal.parallel import LocalBatch, Replica, Share, Split, build_replica
from shoal.parallel.hooks import refuse_max_norm
from shoal.strategy import Async, Solo
from shoal.sync import (
    Agreement,
    Meetings,
    Setting,
    build_agreement,
    build_meetings,
    warnings_of,
)

if TYPE_CHECKING:
    from shoal.parallel.pipeline import StagedReplica


@dataclass
class Job:
    """The live parts of one rank, ready for the step ``next_step`` (0-based)."""

    groups: Groups
    workload: Workload
    replica: "Replica | StagedReplica"
    agreement: Agreement
    optimizer: torch.optim.Optimizer
    next_step: int = 0
    group_names: tuple[tuple[str, ...], ...] = ()  # of the optimizer's groups, over all ranks
    feed: Feed | None = None  # what the replica reads, if that is not the workload's global batch
    evaluation: Feed | None = None  # likewise
    meetings: Meetings | None = None  # of replicas that have weights of their own for a while
    owned: dict[str, int] | None = None  # in asynchronous SGD: which rank owns which tensor
    warnings: tuple[str, ...] = ()  # what whoever started the run should know

    @property
    def parameter_names(self) -> dict[torch.nn.Parameter, str]:
        """Each parameter's qualified name in the user's module; tied ones once."""
        return {parameter: name for name, parameter in self.replica.holding.named_parameters()}

    def part_of(self, name: str, tensor: Tensor) -> Part:
        """Which part of the tensor `name` this rank's `tensor` is.

        An optimizer's state of a parameter (``fc.weight/exp_avg``) that has the parameter's shape
        is cut like it; any other is whole on each rank.
        """
        owner, _, key = name.rpartition("/")
        part = self.replica.layout[owner or name]
        shape = tuple(tensor.shape)
        if "@" in key:  # one rank's own, see `sync.sums.Line`
            return Part.whole(shape)
        return part if "/" not in name or (shape and shape == part.shape) else Part.whole(shape)

    def read(self, step: int) -> tuple[LocalBatch, Share]:
        """This rank's rows of a training step, and who has the others."""
        work = self.workload
        feed, last = self.feed or work.feed, work.total_steps - 1
        return local_batch(feed, step, self.groups.within.data.rank, self.replica, last)

    def own_examples(self, step: int) -> int:
        """How many examples of a step this replica has for itself; all of them, where all agree."""
        return (self.feed or self.workload.feed).batch_examples(step)

    def set_learning_rate(self, step: int) -> float:
        """Set the rate of `step` from the share of samples seen by its middle.

        Returns the first parameter group's.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._factor(step)
        return float(self.optimizer.param_groups[0]["lr"])

    def learning_rate(self, step: int) -> float:
        """The first parameter group's rate in `step`; nothing is set."""
        return float(self.optimizer.param_groups[0]["initial_lr"] * self._factor(step))

    def _factor(self, step: int) -> float:
        # The middle of the step: a warm-up's first step and a cosine's last would else be wasted.
        work = self.workload
        seen = work.samples_before(step) + work.feed.batch_examples(step) / 2
        return work.schedule(min(1.0, seen / work.total_samples))

    def update(self) -> Tensor | None:
        """Clip, update, and forget the gradients; the gradient's norm where it was needed."""
        norm = None
        if self.workload.clip_norm is not None:
            norm = self.replica.gradient_norm()
            torch.nn.utils.clip_grads_with_norm_(
                self.replica.holding.parameters(), self.workload.clip_norm, norm
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.replica.updated()
        return norm


def assemble(
    groups: Groups,
    workload: Workload,
    execution: Execution,
    state: Checkpoint | None = None,
    look: Callable[[nn.Module], None] = lambda _model: None,
) -> Job:
    """Build this rank's replica, optimizer and agreement, from `state` or from the seed.

    ``look`` gets the plain model with its first weights, whole, before anything is cut: what ranks
    compare. Collective over ``groups``.
    """
    model = workload.first_model(execution.dtype)
    refuse_max_norm(model, groups.within.data.size)
    # A checkpoint is read into the plain module, before anything is wrapped around it.
    if state is not None:
        _restore_model(state, model)
    look(model)
    model.to(groups.device)
    # Over the whole model: a rank of a pipeline may hold none of some group's parameters.
    optimizer = workload.build_optimizer(model)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    group_names = tuple(
        tuple(names[parameter] for parameter in group["params"]) for group in optimizer.param_groups
    )
    del names
    if not optimizer.state:
        # Whole parameters are to go as soon as they are cut.
        for group in optimizer.param_groups:
            group["params"] = []
    build = _staged if execution.staged else _eager
    within = groups.within
    replica = build(within, workload, execution, model)
    owned = None
    if isinstance(execution.agreement, Async) and groups.mail is not None:
        owned = share_out(replica, groups, execution.agreement)
    _rebind(optimizer, group_names, dict(replica.holding.named_parameters()))
    if owned is not None:
        learn.check_parted(optimizer)
    cut = (execution.zero and within.data.size > 1) or groups.tensor.size > 1
    warnings = learn.check_cut(optimizer) if cut else ()
    if groups.pipeline.size > 1 and not cut:
        warnings = learn.check_parted(optimizer)
    apart, place = execution.agreement.apart, groups.within.world.rank
    agreement = build_agreement(
        within,
        summed=replica.sums_gradients,
        compress=None if apart else execution.compress,
        place=groups.model.rank,
    )
    agreement.attach(replica)
    job = Job(groups, workload, replica, agreement, optimizer, 0, group_names, warnings=warnings)
    job.owned = owned
    if state is not None:
        _restore_optimizer(state, job)
        job.next_step = state.step
    if owned is not None and workload.evaluation is not None:
        job.evaluation = ReplicaFeed(workload.evaluation, groups.between.rank, groups.between.size)
    if apart:
        _set_apart(job, execution, place)
    if state is not None:
        _restore_sync(state, job, job.agreement if job.meetings is None else job.meetings)
    return job


def _set_apart(job: Job, execution: Execution, place: int) -> None:
    """What replicas need that have weights of their own for a while."""
    between, work, way = job.groups.between, job.workload, execution.agreement
    unit = work.normalize_over or 1

    def examples(step: int) -> list[int]:
        cut = shares(work.feed.batch_examples(step), between.size, unit)
        return [stop - start for start, stop in cut]

    if not isinstance(way, Solo):  # there the feed is the member's own, see `members_of`
        job.feed = ReplicaFeed(work.feed, between.rank, between.size, unit)
        if work.evaluation is not None:
            job.evaluation = ReplicaFeed(work.evaluation, between.rank, between.size)
    setting = Setting(
        between,
        job.replica.holding,
        job.optimizer,
        work.total_steps,
        examples,
        execution.compress,
        place,
    )
    job.meetings = build_meetings(way, setting)
    job.warnings += warnings_of(way, work.total_steps)


def _restore_sync(state: Checkpoint, job: Job, sync: Agreement | Meetings) -> None:
    """What the checkpoint holds of the way in which replicas agree, cut as this rank's is.

    What is of other shapes than now is left out: it was of another rank's part.
    """
    own, held = sync.state(), {}
    for name in state.names:
        owner, _, key = name.rpartition("/")
        if not key.startswith("sync.") or owner not in job.replica.layout:
            continue
        part = job.replica.layout[owner]
        if name in own:
            part = job.part_of(name, own[name])
        if "@" not in key and state.shape(name) == part.global_shape:
            held[name] = state.read_part(name, part)
        elif name in own and state.shape(name) == tuple(own[name].shape):
            held[name] = state.read(name)
    sync.restore(held)


def _eager(groups: Groups, workload: Workload, execution: Execution, model: nn.Module) -> Replica:
    """The user's module, called as it is."""
    return build_replica(
        model,
        workload.objective,
        execution.numerics,
        group=groups.statistics,
        seed=workload.seed,
        normalize_over=workload.normalize_over,
        split=Split(execution.zero, execution.microbatches, execution.offload, groups),
        recompute=execution.recompute,
        compiled=execution.compiled,
    )


def _staged(
    groups: Groups, workload: Workload, execution: Execution, model: nn.Module
) -> "StagedReplica":
    """The model traced, and cut between its layers or in them."""
    # It brings torch.export with it: a second of a rank's start that most strategies do not need.
    from shoal.parallel.pipeline import Staging, build_staged_replica

    return build_staged_replica(
        model.train(),
        workload.objective,
        execution.numerics,
        groups,
        Staging(execution.schedule, execution.microbatches, execution.chunks, execution.sequences),
        _example(workload, groups, execution),
        seed=workload.seed,
        normalize_over=workload.normalize_over,
        recompute=execution.recompute,
        zero=execution.zero,
        offload=execution.offload,
    )


def _example(workload: Workload, groups: Groups, execution: Execution) -> Any:
    """Inputs as a replica's share has them, of two rows at least: one alone is there twice."""
    examples = workload.feed.batch_examples(0)
    rows = max(min(2, examples), -(-examples // groups.data.size))
    batch = workload.feed.read(0, 0, rows).to(
        groups.device, execution.dtype, channels_last=execution.channels_last
    )
    return batch.inputs if rows > 1 else tree_map(_twice, batch.inputs)


def _twice(leaf: Any) -> Any:
    return torch.cat((leaf, leaf)) if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _rebind(
    optimizer: torch.optim.Optimizer,
    group_names: tuple[tuple[str, ...], ...],
    held: dict[str, nn.Parameter],
) -> None:
    """Let an optimizer of the whole model update what this rank holds of it.

    Groups stay where they are, and may become empty. Raises `Refused` for one that has made its
    state already: that is of the whole parameters.
    """
    groups = list(zip(optimizer.param_groups, group_names, strict=True))
    same = all(
        held.get(name) is parameter
        for group, names in groups
        for name, parameter in zip(names, group["params"], strict=False)
    )
    if optimizer.state and not same:
        raise Refused(
            f"{type(optimizer).__name__} makes its state before the first step, for whole "
            "parameters, and this strategy cuts them",
            hint="Use an optimizer that makes its state in its first step (sgd, adam, adamw).",
        )
    for group, names in groups:
        group["params"] = [held[name] for name in names if name in held]


def _restore_model(state: Checkpoint, model: nn.Module) -> None:
    """Copy every parameter and buffer of `state` into the plain module, bit for bit."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(state.read(name))


def _restore_optimizer(state: Checkpoint, job: Job) -> None:
    own = set(job.parameter_names.values())
    tensors = {}
    for name in state.names:
        parameter = name.rpartition("/")[0]
        of_meetings = name.rpartition("/")[2].startswith("sync.")
        if name in state.weights or parameter not in own or of_meetings:
            continue
        part = job.replica.layout[parameter]
        is_like = state.shape(name) == part.global_shape and len(part.global_shape) > 0
        tensors[name] = state.read_part(name, part) if is_like else state.read(name)
    restore(job.optimizer, job.parameter_names, tensors, state.manifest.optimizer)
