"""`Workload`: what is computed, as live functions; of a recipe, or of a user's own functions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shoal import data, learn, models
from shoal.data import MemberFeed
from shoal.errors import Refused
from shoal.job.sharing import Feed, ReplicaFeed, share_of
from shoal.parallel import LocalBatch, Numerics, Objective, Replica, Share
from shoal.recipe import Recipe
from shoal.strategy import EVERY_STEP, Agreement, Compress, Strategy

if TYPE_CHECKING:
    from shoal.parallel.pipeline import StagedReplica

Metric = Callable[[Any, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Execution:
    """How the replicas compute: what a strategy says beside the split."""

    bf16: bool = False
    channels_last: bool = False
    compiled: bool = False
    recompute: bool = False
    zero: int = 0
    microbatches: int = 1
    staged: bool = False
    schedule: str = "1f1b"
    chunks: int | None = None
    sequences: bool = False
    offload: bool = False
    agreement: Agreement = EVERY_STEP
    compress: Compress | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, strategy: Strategy, dtype: torch.dtype = torch.float32) -> "Execution":
        return cls(
            bf16=strategy.bf16,
            channels_last=strategy.channels_last,
            compiled=strategy.compile,
            recompute=strategy.recompute is not None,
            zero=strategy.zero.stage if strategy.zero is not None else 0,
            microbatches=strategy.microbatches,
            staged=strategy.pp * strategy.tp > 1,
            schedule=strategy.schedule.method if strategy.schedule is not None else "1f1b",
            chunks=strategy.schedule.chunks if strategy.schedule is not None else None,
            sequences=strategy.sp,
            offload=strategy.offload,
            agreement=strategy.agreement,
            compress=strategy.compress,
            dtype=dtype,
        )

    @property
    def numerics(self) -> Numerics:
        return Numerics(self.dtype, self.bf16, self.channels_last)


@dataclass(frozen=True)
class Workload:
    """What is computed: everything that a step needs, and nothing about devices."""

    build_model: Callable[[], nn.Module]
    objective: Objective
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    schedule: Callable[[float], float]
    feed: Feed
    seed: int
    total_steps: int
    normalize_over: int | None = None
    clip_norm: float | None = None
    evaluation: Feed | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    initial_seed: int | None = None  # of the first weights, where that is not the recipe's

    @property
    def total_samples(self) -> int:
        """Examples in the whole run, the last partial batch of each epoch included."""
        return self.samples_before(self.total_steps)

    def samples_before(self, step: int) -> int:
        """Examples seen when step `step` (0-based) begins. Only an epoch's last may be partial."""
        epochs, rest = divmod(step, self.feed.steps_per_epoch)
        return epochs * self.feed.examples + (rest * self.feed.batch_examples(0) if rest else 0)

    def first_model(self, dtype: torch.dtype) -> nn.Module:
        """The model with its initial weights: the factory, whole, under one seeded CPU generator.

        The generator of the process is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed if self.initial_seed is None else self.initial_seed)
            model = self.build_model()
        _refuse_complex(model)
        model._apply(lambda tensor: _in(tensor, dtype))  # type: ignore[no-untyped-call]
        return model


def _in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a type of real numbers, or in its complex one: `Module.to` makes that real."""
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype == torch.float64 else torch.complex64)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _refuse_complex(model: nn.Module) -> None:
    """Raise `Refused` for complex parameters: a change of type would drop their imaginary part."""
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise Refused(
                f"the parameter {name} is complex ({parameter.dtype}); Shoal trains real ones",
                hint="Keep real and imaginary parts in a real parameter [..., 2], and use "
                "torch.view_as_complex(parameter) in forward.",
            )


def workload_of(recipe: Recipe, *, keeps_a_tenth: bool = False) -> Workload:
    """The workload of a recipe: opens its data, prepares its parts. Raises what they raise.

    ``keeps_a_tenth``: a tenth of the training data is not trained on, for choosing among models;
    there are as many steps as with it.
    """
    train, held_out = data.resolve(recipe.data)
    feed = data.open_feed(
        train,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        shuffle=True,
        on_bad_example=recipe.data.on_bad_example,
        tenth="left out" if keeps_a_tenth else "included",
    )
    evaluation = None
    if held_out is not None:
        evaluation = data.open_feed(
            held_out,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            shuffle=False,
            on_bad_example=recipe.data.on_bad_example,
        )
    about = data.describe(train)

    def build_model() -> nn.Module:
        return models.build(
            recipe.model,
            classes=about.num_classes,
            in_channels=about.in_channels,
            image_size=train.transform.image_size or about.image_size,
        )

    ignore = recipe.objective.options.get("ignore_index")
    return Workload(
        build_model=build_model,
        objective=learn.build_objective(recipe.objective),
        build_optimizer=lambda model: learn.build_optimizer(recipe.optimizer, model),
        schedule=learn.build_schedule(recipe.schedule),
        feed=feed,
        seed=recipe.seed,
        total_steps=recipe.steps or (recipe.epochs or 1) * -(-about.examples // recipe.batch_size),
        normalize_over=None if recipe.normalize_over == "batch" else recipe.normalize_over,
        clip_norm=learn.clip_norm_of(recipe.optimizer),
        evaluation=evaluation,
        metrics=learn.build_metrics(recipe.evaluate.metrics, ignore_index=ignore),
    )


def local_batch(
    feed: Feed, step: int, rank: int, replica: "Replica | StagedReplica", last_step: int
) -> tuple[LocalBatch, Share]:
    """This rank's rows of a step, on the replica's device and in its precision; and all shares.

    The next step's rows are asked for ahead, unless `step` is the last. What stands in for an empty
    share (see `Share`) is not reported as bad: another rank does that.
    """
    share = share_of(feed.batch_examples(step), replica.ranks, replica.unit)
    if isinstance(feed, ReplicaFeed | MemberFeed):
        share = replace(share, first=feed.first(step))
    batch = feed.read(step, *share.reads(rank))
    if share.is_empty(rank) and len(getattr(batch, "bad", ())):
        batch = replace(batch, bad=())
    following = feed.batch_examples(step + 1) if step < last_step else 0
    if following:
        feed.prefetch(step + 1, *share_of(following, replica.ranks, replica.unit).reads(rank))
    moved: LocalBatch = batch.to(
        replica.device, replica.numerics.dtype, channels_last=replica.numerics.channels_last
    )
    return moved, share
