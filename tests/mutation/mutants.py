"""The bugs: each a change of Shoal on the ranks for the time of one verification.

    Mutant("gradients averaged", "dp2", "perceptron", plant, "averaged")

`words` are a part of the cause that has to be named: one of those between bars.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from distributed import planted

SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "no_decay": ["bias"]}
ADAMW = {"name": "adamw", "lr": 0.01, "weight_decay": 0.1}
CLIPPED = {**SGD, "clip_norm": 0.05}

Plant = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class Mutant:
    """A bug, where it shows, and words of which one has to be in the cause."""

    name: str
    strategy: str
    subject: str
    plant: Plant
    words: str
    optimizer: dict[str, Any] = field(default_factory=lambda: dict(SGD))


def patched(target: str, replacement: Callable[[Any], Any]) -> Plant:
    """Replace ``module:Class.method`` by what `replacement` makes of it."""

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        from importlib import import_module

        module, _, path = target.partition(":")
        *owners, name = path.split(".")
        owner: Any = import_module(module)
        for each in owners:
            owner = getattr(owner, each)
        with mock.patch.object(owner, name, replacement(getattr(owner, name))):
            yield

    return plant


# ---- what the replicas sum


def summed_as(change: Callable[[Any, Any], None]) -> Plant:
    """Change a bucket before (`change` returns None) it is summed."""

    def replacement(right: Any) -> Any:
        def _sum(self: Any, bucket: Any) -> Any:
            change(self._group, bucket)
            return right(self, bucket)

        return _sum

    return patched("shoal.sync:EveryStep._sum", replacement)


def _in_bf16(_group: Any, bucket: Any) -> None:
    bucket.flat.copy_(bucket.flat.bfloat16())


def _without_last(group: Any, bucket: Any) -> None:
    if group.rank == group.size - 1:
        bucket.flat[: -len(bucket.parameters)].zero_()


def _twice(right: Any) -> Any:
    def _sum(self: Any, bucket: Any) -> Any:
        pending = right(self, bucket)
        pending.wait()
        return right(self, bucket)

    return _sum


def _rounded_sum(right: Any) -> Any:
    def _sum(self: Any, bucket: Any) -> Any:
        from shoal.comm import Pending

        total = right(self, bucket).wait()
        total.copy_(total.bfloat16())
        return Pending(total)

    return _sum


# ---- rows and masks


def _own_rows(right: Any) -> Any:
    def begin(self: Any, step: int, rows: Any, rank: int) -> Any:
        return right(self, step, rows - int(rows[0]) if len(rows) else rows, rank)

    return begin


def _next_step(right: Any) -> Any:
    def begin(self: Any, step: int, rows: Any, rank: int) -> Any:
        return right(self, step + rank, rows, rank)  # rank 0 is one device too

    return begin


def _rows_of_first(right: Any) -> Any:
    """Every replica reads from the start of the batch."""

    def read(self: Any, step: int, start: int, stop: int) -> Any:
        from dataclasses import replace

        batch = right(self, step, 0, stop - start)
        return replace(batch, rows=torch.arange(start, stop))

    return read


def _joined_backwards(right: Any) -> Any:
    def join(parts: Any, rows: Any) -> Any:
        return right(list(reversed(parts)), list(reversed(rows)))

    return join


# ---- updates


def updating(before: Callable[[Any], None]) -> Plant:
    def replacement(right: Any) -> Any:
        def update(self: Any) -> Any:
            before(self)
            return right(self)

        return update

    return patched("shoal.job:Job.update", replacement)


def _decay_twice(job: Any) -> None:
    for group in job.optimizer.param_groups:
        group["weight_decay"] = group.setdefault("right", group["weight_decay"]) * 2


def _decay_all(job: Any) -> None:
    most = max(group["weight_decay"] for group in job.optimizer.param_groups)
    for group in job.optimizer.param_groups:
        group["weight_decay"] = most


def _rate_by_ranks(job: Any) -> None:
    for group in job.optimizer.param_groups:
        group["lr"] *= job.groups.world.size


def _forget_state(job: Any) -> None:
    for state in job.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and key != "step":
                value.zero_()


def _count_on(job: Any) -> None:
    for state in job.optimizer.state.values():
        if "step" in state:
            state["step"] += 1


def _update_twice(right: Any) -> Any:
    def update(self: Any) -> Any:
        kept = {p: p.grad.clone() for p in self.replica.holding.parameters() if p.grad is not None}
        hooks, self.optimizer._optimizer_step_pre_hooks = (
            self.optimizer._optimizer_step_pre_hooks,
            {},
        )
        self.optimizer.step()
        self.optimizer._optimizer_step_pre_hooks = hooks
        for parameter, gradient in kept.items():
            parameter.grad = gradient
        return right(self)

    return update


# ---- microbatches and pipelines


def scaled_gradients(factor: Callable[[Any], float]) -> Plant:
    """`rescale` with another factor, of eager and of staged replicas."""

    @contextlib.contextmanager
    def plant() -> Iterator[None]:
        from shoal.parallel import Replica
        from shoal.parallel.pipeline import StagedReplica

        def replacement(right: Any) -> Any:
            def rescale(self: Any, count: float) -> Any:
                right(self, count)
                for parameter in self.holding.parameters():
                    if parameter.grad is not None:
                        parameter.grad.mul_(factor(self))

            return rescale

        with (
            mock.patch.object(Replica, "rescale", replacement(Replica.rescale)),
            mock.patch.object(StagedReplica, "rescale", replacement(StagedReplica.rescale)),
        ):
            yield

    return plant


def _number_of_microbatches(replica: Any) -> int:
    return replica.table.microbatches if hasattr(replica, "table") else replica.microbatches


def _last_microbatch_only(right: Any) -> Any:
    """Gradients are set to zero before each microbatch."""

    def begin(self: Any, *arguments: Any, **how: Any) -> Any:
        for parameter in self.model.parameters():
            parameter.grad = None
        return right(self, *arguments, **how)

    return begin


def _tied_not_summed(_right: Any) -> Any:
    return lambda self: None


def _skip_lost(right: Any) -> Any:
    """What passes through a stage gets no gradient back."""

    def send(self: Any, message: Any, values: Any) -> Any:
        if message.kind == "B" and len(values) > 1:
            values = [*values[:-1], None if values[-1] is None else torch.zeros_like(values[-1])]
        return right(self, message, values)

    return send


def _local_norm(_right: Any) -> Any:
    def gradient_norm(self: Any) -> Any:
        found = [p.grad for p in self.holding.parameters() if p.grad is not None and p.numel()]
        return torch.nn.utils.get_total_norm(found)

    return gradient_norm


def _stage_without_update(right: Any) -> Any:
    def update(self: Any) -> Any:
        kept = {p: p.detach().clone() for p in self.replica.model.parameters()}
        norm = right(self)
        if self.groups.pipeline.rank == 1:
            with torch.no_grad():
                for parameter, old in kept.items():
                    parameter.copy_(old)
        return norm

    return update


# ---- tensor parallelism


def _not_summed_back(_right: Any) -> Any:
    return staticmethod(lambda ctx, *gradients: (gradients[0], None))


def _not_summed_forward(_right: Any) -> Any:
    return staticmethod(lambda ctx, value, group: value.clone())


def _bias_everywhere(right: Any) -> Any:
    """After a sum over the ranks the bias is added as often as there are ranks."""

    def apply(made: Any, traced: Any, model: Any, group: Any) -> Any:
        mine = right(made, traced, model, group)
        summed = {node for node in mine.graph.nodes
                  if node.meta.get("collective", ("", True)) == ("all_reduce", False)}  # fmt: skip
        for node in list(mine.graph.nodes):
            if any(given in summed for given in node.all_input_nodes) and len(node.args) > 1:
                bias = next((g for g in node.all_input_nodes if mine.state.get(g.name, "").endswith(
                    "bias")), None)  # fmt: skip
                if bias is None:
                    continue
                with mine.graph.inserting_after(node):
                    again = mine.graph.call_function(torch.ops.aten.add.Tensor, (node, bias))
                again.meta = dict(node.meta)
                node.replace_all_uses_with(
                    again, delete_user_cb=lambda user, a=again: user is not a
                )
        return mine

    return apply


def _others_than(again: Any) -> Any:
    return lambda user: user is not again


def _tensor_rank_stale(right: Any) -> Any:
    def update(self: Any) -> Any:
        kept = {p: p.detach().clone() for p in self.replica.model.parameters()}
        norm = right(self)
        if self.groups.tensor.rank == 1:
            with torch.no_grad():
                for parameter, old in kept.items():
                    parameter.copy_(old)
        return norm

    return update


# ---- ZeRO


def _not_spread(_right: Any) -> Any:
    return lambda self: None


def _pairs_of_others(right: Any) -> Any:
    """Gathered pieces are put into the places of another rank."""

    def pairs(self: Any, bunch: Any, flat: Any, rank: int) -> Any:
        packed, places = right(self, bunch, flat, rank)
        if rank != self._group.rank:
            packed = [piece.flip(0) for piece in packed]
        return packed, places

    return pairs


def _state_of_others(right: Any) -> Any:
    """A checkpoint's rows of the optimizer's state go to another rank."""

    def read_part(self: Any, name: str, part: Any) -> Any:
        if "/" in name and not part.is_whole and part.shape[0] * 2 == part.global_shape[0]:
            start = part.shape[0] - part.boxes[0].offset[0]
            from shoal.layout import Part

            part = Part.whole(part.global_shape).narrow(0, start, start + part.shape[0])
        return right(self, name, part)

    return read_part


MUTANTS = [
    Mutant("not summed", "dp2", "perceptron", planted.gradients_not_summed, "not summed"),
    Mutant("averaged", "dp2", "perceptron", planted.gradients_averaged, "averaged"),
    Mutant("averaged of three", "dp3", "tied", planted.gradients_averaged, "averaged"),
    Mutant(
        "summed twice",
        "dp2",
        "perceptron",
        patched("shoal.sync:EveryStep._sum", _twice),
        "twice|once too often",
    ),
    Mutant("mean of means", "dp2", "perceptron", planted.mean_of_means, "mean of means"),
    Mutant("mean of means of three", "dp3", "perceptron", planted.mean_of_means, "mean of means"),
    Mutant("tokens as examples", "dp2", "masked", planted.tokens_weighted_as_examples, "tokens"),
    Mutant("statistics local", "dp2", "normed", planted.statistics_not_synchronised, "statistics"),
    Mutant(
        "running statistics of one",
        "dp2",
        "normed",
        planted.running_statistics_of_one_rank,
        "running statistics",
    ),
    Mutant("last rows dropped", "dp2", "perceptron", planted.last_rows_dropped, "dropped"),
    Mutant("decay forgotten", "dp2", "perceptron", planted.weight_decay_forgotten, "weight decay"),
    Mutant(
        "one rank without gradient",
        "dp2",
        "perceptron",
        planted.one_rank_without_a_gradient,
        "rank 1|replicas differ",
    ),
    Mutant("NaN on one rank", "dp2", "perceptron", planted.not_a_number_on_one_rank, "finite"),
    Mutant("stale weights", "dp2", "perceptron", planted.stale_weights_on_one_rank, "stale"),
    Mutant(
        "wrong group",
        "dp3",
        "perceptron",
        summed_as(_without_last),
        "wrong group|wrong ranks|replica 0, 1",
    ),
    Mutant(
        "bf16 reduction",
        "dp2",
        "perceptron",
        patched("shoal.sync:EveryStep._sum", _rounded_sum),
        "bfloat16",
    ),
    Mutant(
        "masks repeated",
        "dp2",
        "dropping",
        patched("shoal.parallel.randomness:StepKey.begin", _own_rows),
        "masks are repeated",
    ),
    Mutant(
        "masks of another step",
        "dp2",
        "dropping",
        patched("shoal.parallel.randomness:StepKey.begin", _next_step),
        "another step",
    ),
    Mutant(
        "rows read twice",
        "dp2",
        "perceptron",
        patched("shoal.verify.feeds:VerifyingFeed.read", _rows_of_first),
        "read twice",
    ),
    Mutant("decay twice", "dp2", "perceptron", updating(_decay_twice), "decay is applied twice"),
    Mutant("decay of what is spared", "dp2", "perceptron", updating(_decay_all), "not to decay"),
    Mutant("rate by ranks", "dp2", "perceptron", updating(_rate_by_ranks), "learning rate"),
    Mutant("state forgotten", "dp2", "perceptron", updating(_forget_state), "state is lost"),
    Mutant("step count", "dp2", "perceptron", updating(_count_on), "step count", dict(ADAMW)),
    Mutant(
        "update twice",
        "dp2",
        "perceptron",
        patched("shoal.job:Job.update", _update_twice),
        "update is done twice",
    ),
    Mutant(
        "microbatches divided twice",
        "mb:3",
        "perceptron",
        scaled_gradients(lambda r: 1 / _number_of_microbatches(r)),
        "microbatches",
    ),
    Mutant(
        "microbatches not divided",
        "mb:3",
        "perceptron",
        scaled_gradients(_number_of_microbatches),
        "microbatches",
    ),
    Mutant(
        "last microbatch only",
        "mb:2",
        "perceptron",
        patched("shoal.parallel:Replica._begin", _last_microbatch_only),
        "microbatch",
    ),
    Mutant(
        "tied gradient dropped",
        "pp2/mb:2",
        "tied",
        patched("shoal.parallel.pipeline.tied:Tied.sum_gradients", _tied_not_summed),
        "tied|replicas differ",
    ),
    Mutant(
        "skip's gradient lost",
        "pp3/mb:2",
        "skips",
        patched("shoal.parallel.pipeline.links:Links.send", _skip_lost),
        "skip",
    ),
    Mutant(
        "pipeline divided by microbatches",
        "pp2/mb:3",
        "perceptron",
        scaled_gradients(lambda r: 1 / _number_of_microbatches(r)),
        "microbatches",
    ),
    Mutant(
        "microbatches in wrong order",
        "pp2/mb:2",
        "perceptron",
        patched("shoal.parallel.pipeline.replica:join", _joined_backwards),
        "another order|wrong order",
    ),
    Mutant(
        "pipeline clips by local norm",
        "pp2/mb:2",
        "perceptron",
        patched("shoal.parallel.pipeline:StagedReplica.gradient_norm", _local_norm),
        "local norm",
        dict(CLIPPED),
    ),
    Mutant(
        "stage not updated",
        "pp2/mb:2",
        "perceptron",
        patched("shoal.job:Job.update", _stage_without_update),
        "stale",
    ),
    Mutant(
        "pipeline's masks repeated",
        "pp2.dp2/mb:1",
        "dropping",
        patched("shoal.parallel.randomness:StepKey.begin", _own_rows),
        "masks are repeated",
    ),
    Mutant(
        "pipeline gradients averaged",
        "pp2.dp2/mb:2",
        "perceptron",
        planted.gradients_averaged,
        "averaged",
    ),
    Mutant(
        "no sum on the way back",
        "tp2",
        "tied",
        patched("shoal.comm.differentiable:_Enter.backward", _not_summed_back),
        "all-reduce is missing|partial sums|way back",
    ),
    Mutant(
        "no sum forward",
        "tp2",
        "perceptron",
        patched("shoal.comm.differentiable:_Leave.forward", _not_summed_forward),
        "partial sums",
    ),
    Mutant(
        "bias on every tensor rank",
        "tp2",
        "perceptron",
        patched("shoal.parallel.tensor:apply", _bias_everywhere),
        "bias",
    ),
    Mutant(
        "tensor clips by local norm",
        "tp2",
        "perceptron",
        patched("shoal.parallel.pipeline:StagedReplica.gradient_norm", _local_norm),
        "local norm",
        dict(CLIPPED),
    ),
    Mutant(
        "tensor rank stale",
        "tp2",
        "perceptron",
        patched("shoal.job:Job.update", _tensor_rank_stale),
        "stale",
    ),
    Mutant(
        "zero1 pieces not gathered",
        "dp2/zero1",
        "perceptron",
        patched("shoal.parallel.zero.optimizer_rows:OptimizerRows.spread", _not_spread),
        "stale|replicas differ",
    ),
    Mutant(
        "zero1 pieces in wrong order",
        "dp2/zero1",
        "perceptron",
        patched("shoal.parallel.zero.optimizer_rows:OptimizerRows._pairs", _pairs_of_others),
        "order|replicas differ",
    ),
    Mutant(
        "zero1 state of another rank",
        "dp2/zero1",
        "perceptron",
        patched("shoal.checkpoint:Checkpoint.read_part", _state_of_others),
        "order|another rank",
    ),
    Mutant(
        "zero1 decay twice",
        "dp2/zero1",
        "perceptron",
        updating(_decay_twice),
        "decay is applied twice",
    ),
    Mutant(
        "zero3 averaged",
        "dp2/zero3",
        "perceptron",
        scaled_gradients(lambda r: 1 / r.ranks),
        "averaged",
    ),
    Mutant(
        "zero3 clips by local norm",
        "dp2/zero3",
        "perceptron",
        patched("shoal.parallel:Replica.gradient_norm", _local_norm),
        "local norm",
        dict(CLIPPED),
    ),
]

HEALTHY = [
    Mutant(f"healthy {subject}", strategy, subject, contextlib.nullcontext, "", dict(optimizer))
    for strategy, subject, optimizer in (
        ("dp2", "masked", SGD),
        ("dp3", "normed", ADAMW),
        ("dp2", "dropping", CLIPPED),
        ("mb:3", "perceptron", CLIPPED),
        ("pp2/mb:2", "tied", ADAMW),
        ("pp3/mb:2", "skips", CLIPPED),
        ("tp2", "tied", CLIPPED),
        ("pp2.tp2", "perceptron", ADAMW),
        ("dp2/zero1", "tied", CLIPPED),
        ("dp2/zero3", "perceptron", CLIPPED),
        ("pp2.dp2/zero1", "dropping", SGD),
    )
]
