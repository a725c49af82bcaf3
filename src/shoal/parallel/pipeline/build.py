"""`build_staged_replica`: a model cut into stages, prepared for training on this rank.

    staging = Staging("1f1b", microbatches=8)
    replica = build_staged_replica(model, objective, numerics, groups, staging, inputs, seed=0)

The order: trace → tensor parallelism → randomness → batch norm → split backward passes → cut.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm import Groups
from shoal.errors import Refused
from shoal.layout import Part
from shoal.parallel import tensor
from shoal.parallel.batch_groups import BatchGroups
from shoal.parallel.pipeline.blocks import has_batch_norms, use_blocks
from shoal.parallel.pipeline.completion import Completion
from shoal.parallel.pipeline.describing import of_tensors
from shoal.parallel.pipeline.forms import Forms
from shoal.parallel.pipeline.links import Links
from shoal.parallel.pipeline.norms import batch_norms, refuse_written_buffers, use_group_norms
from shoal.parallel.pipeline.parts import Parts
from shoal.parallel.pipeline.placing import tensors_of
from shoal.parallel.pipeline.replica import StagedReplica
from shoal.parallel.pipeline.tied import Tied
from shoal.parallel.pipeline.weights import Later, split_weights
from shoal.parallel.randomness import StepKey, use_counted_randomness
from shoal.parallel.recompute import find_blocks
from shoal.parallel.replica import Numerics, Objective, each_tensor
from shoal.parallel.zero import GatheredRows, of_zero, shard
from shoal.schedule import Table, make
from shoal.trace import Traced
from shoal.trace.structure import take_apart


@dataclass(frozen=True)
class Staging:
    """How a replica's stages are run: the strategy's schedule and its microbatches.

    ``chunks``: stages on each rank, None for the method's own number. ``sequences``: between layers
    that tensor ranks share, each keeps a part of the sequence.
    """

    method: str = "1f1b"
    microbatches: int = 1
    chunks: int | None = None
    sequences: bool = False

    def table(self, ranks: int) -> Table:
        table = make(self.method, ranks, self.microbatches, self.chunks)
        table.validate()
        return table


def build_staged_replica(
    model: nn.Module,
    objective: Objective,
    numerics: Numerics,
    groups: Groups,
    staging: Staging,
    inputs: Any,
    *,
    seed: int,
    normalize_over: int | None = None,
    recompute: bool = False,
    zero: int = 0,
    offload: bool = False,
) -> StagedReplica:
    """Cut `model`, whole on each rank and in training mode, over ``groups.pipeline``.

    ``inputs``: an example of what a replica's share is, two rows at least; only its shapes matter.
    ``normalize_over`` as for `build_replica`. Afterwards `model` has this rank's tensors only.
    Raises `Refused` for a model that cannot be traced, cut, or trained in microbatches. Collective.
    """
    table = staging.table(groups.pipeline.size)
    builder = _Builder(model, groups, table, BatchGroups(normalize_over, groups.statistics), seed)
    builder.sequences = staging.sequences
    if zero > 1 and groups.shard.size > 1:
        builder.rows = GatheredRows(groups, keep=zero == 2, later=table.splits_backward)
    _require_training(model)
    count = sum(parameter.numel() for parameter in model.parameters())
    of_states = of_zero(zero, list(model.parameters()), groups.shard.size)
    # Rows are cut in the usual order only: there, inputs alone are so.
    if numerics.channels_last and builder.rows is None:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    builder.make_forms(_like_microbatch(inputs, staging.microbatches), recompute)
    states = shard(zero, model, model, groups, offload=offload, traced=builder.rows)
    links = Links(groups.pipeline, table, groups.device)
    about = (*builder.forms.about, *builder.about, *of_states)
    return StagedReplica(
        Parts(
            model,
            objective,
            numerics,
            groups,
            table,
            builder.forms,
            links,
            builder.batch_groups,
            builder.key,
            builder.later,
            builder.tied(),
            Completion(builder.parameters_by_stage()),
            builder.cut,
            states,
            builder.rows,
            about,
            builder.has_norms,
            builder.plan,
            count,
        )
    )


def _require_training(model: nn.Module) -> None:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise Refused(
            "every parameter of this model is frozen (requires_grad is False): "
            "there is nothing to train",
            hint="Unfreeze at least one parameter.",
        )


def _like_microbatch(inputs: Any, microbatches: int) -> tuple[Any, int]:
    """The first rows of an example, as many as a microbatch has (two at least), and how many."""
    _, tensors = take_apart(inputs)
    rows = next((tensor.shape[0] for tensor in tensors if tensor.dim()), 1)
    size = min(rows, max(2, -(-rows // microbatches)))

    def some(leaf: Tensor) -> Tensor:
        return leaf[:size] if leaf.dim() and leaf.shape[0] == rows else leaf

    return each_tensor(some, inputs), size


class _Builder:
    """Traces, rewrites and cuts; what comes of it is a replica's `Parts`."""

    def __init__(
        self, model: nn.Module, groups: Groups, table: Table, batch_groups: BatchGroups, seed: int
    ) -> None:
        self.model, self.groups, self.table = model, groups, table
        self.batch_groups = batch_groups
        self.key = StepKey(seed)
        self.key.know(model)
        self.later = Later()
        self.rows: GatheredRows | None = None
        self.cut: dict[str, Part] = {}
        self.plan: tensor.TensorPlan | None = None
        self.about: tuple[str, ...] = ()
        self.has_norms = False
        self.sequences = False

    def make_forms(self, example: tuple[Any, int], recompute: bool) -> None:
        blocks: tuple[str, ...] = ()
        if recompute or self.rows is not None:
            paths = {id(module): path for path, module in self.model.named_modules()}
            blocks = tuple(paths[id(block)] for block in find_blocks(self.model))
            if recompute and not blocks:
                raise Refused(
                    "recompute: this model has no blocks (children of an nn.Sequential or "
                    "nn.ModuleList)",
                    hint="Leave +recompute out, or group the model's layers into an nn.Sequential.",
                )
        self.forms = Forms(
            self.model,
            self.table,
            self.groups.pipeline.rank,
            self.rewrite,
            blocks,
            again=recompute,
            rows=self.rows,
        )
        self.forms.of(training=True, inputs=example[0], rows=example[1])

    def rewrite(self, traced: Traced, training: bool) -> Traced:
        """Everything that is done to a trace before it is cut."""
        if traced.blocks is not None:
            return self._prepare_blocks(traced, training)
        traced = self._cut_layers(traced)
        use_counted_randomness(traced, self.key)
        if batch_norms(traced):
            self._check_norms(training)
            use_group_norms(traced, self.model, self.batch_groups)
        if training and self.table.microbatches > 1:
            refuse_written_buffers(traced)
        if self.table.splits_backward and training:
            split_weights(traced, self.later)
        return traced

    def _prepare_blocks(self, traced: Traced, training: bool) -> Traced:
        """The same for a model whose children run as they are: their layers are made ours."""
        skeleton = self.forms.skeleton
        if has_batch_norms(skeleton):
            self._check_norms(training)
        once = training and self.table.microbatches == 1 and not self.forms.blocks
        use_blocks(traced, skeleton, self.key, self.batch_groups, may_write=once or not training)
        if self.groups.tensor.size > 1 and self.plan is None:
            self.plan = tensor.nothing(self.groups.tensor.size, skeleton)
            self.about += self.plan.warnings
        self.about = tuple(dict.fromkeys((*self.about, *traced.notes)))
        return traced

    def _cut_layers(self, traced: Traced) -> Traced:
        """Tensor parallelism: the first trace decides what is cut."""
        group = self.groups.tensor
        if group.size == 1:
            return traced
        if self.plan is None:
            self.plan = tensor.plan(traced, group.size, self.forms.skeleton)
            tensor.cut_model(self.plan, self.model, group.rank)
            parts = self.plan.layout(group.rank)
            for name, first in self.forms.names.items():
                if first in self.plan.cuts:
                    self.cut[name] = parts[first]
            self.about = of_tensors(self.plan)
        mine = tensor.apply(self.plan, traced, self.forms.skeleton, group)
        if self.sequences:
            done = tensor.cut_sequences(mine, self.forms.skeleton, group)
            self.about += () if any(each.startswith("sp: ") for each in self.about) else done
        return mine

    def _check_norms(self, training: bool) -> None:
        self.has_norms = True
        several = self.table.microbatches > 1
        if training and several and self.batch_groups.normalize_over is None:
            raise Refused(
                "batch norm over the whole batch in a pipeline of "
                f"{self.table.microbatches} microbatches: its statistics would be those of "
                "microbatches, which is another model than on one device",
                hint="Use mb:1, normalize_over: N (statistics of groups of N examples), or group "
                "norm.",
            )

    def parameters_by_stage(self) -> dict[int, list[Tensor]]:
        """The parameters of each of this rank's stages."""
        found: defaultdict[int, list[Tensor]] = defaultdict(list)
        mine = self.table.stages_of(self.groups.pipeline.rank)
        for name, parameter in self.model.named_parameters():
            for stage in mine:
                if stage in self.forms.holders[self.forms.names[name]]:
                    found[stage].append(parameter)
        return {stage: found[stage] for stage in mine}

    def tied(self) -> Tied:
        """The parameters that several stages hold, in the order of their names everywhere."""
        held = tensors_of(self.model)
        holders = {}
        for name, stages in sorted(self.forms.holders.items()):
            parameter = held.get(name)
            if isinstance(parameter, nn.Parameter):
                ranks = {self.table.rank_of(stage) for stage in stages}
                kept = parameter if self.rows is None else self.rows.piece_of(parameter)
                holders[kept] = tuple(sorted(ranks))
        return Tied(self.groups.pipeline, holders)
