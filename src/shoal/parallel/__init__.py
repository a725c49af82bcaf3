"""Everything inside a replica, applied to a plain model from outside, in one written order.

    replica = build_replica(model, objective, numerics, group=groups.statistics, seed=0)

The order: batch statistics → dropout → recompute → memory format, products → compile → ZeRO.
(Pipeline and tensor parallelism will come before recompute.)
"""

import shutil
import sys
from dataclasses import dataclass, field

import torch
from torch import nn

from shoal.comm import Group, Groups
from shoal.errors import Refused
from shoal.parallel.microbatches import LocalBatch, Share, cut
from shoal.parallel.pointwise import use_products
from shoal.parallel.randomness import StepKey, use_counted_dropout
from shoal.parallel.randomness.compiling import counting_backend, keep_masks_uncompiled
from shoal.parallel.recompute import use_recompute
from shoal.parallel.replica import (
    Body,
    Numerics,
    Objective,
    Replica,
    Start,
    call_model,
    call_objective,
)
from shoal.parallel.specialise import keep_uncompiled
from shoal.parallel.statistics import (
    BatchGroups,
    GroupBatchNorm,
    refuse_batch_norm,
    use_groups,
)
from shoal.parallel.zero import Persistent, of_zero, persistent, shard

__all__ = [
    "BatchGroups",
    "Body",
    "GroupBatchNorm",
    "LocalBatch",
    "Numerics",
    "Objective",
    "Persistent",
    "Replica",
    "Share",
    "Split",
    "Start",
    "build_replica",
    "call_model",
    "call_objective",
    "cut",
    "persistent",
    "use_groups",
]


@dataclass(frozen=True)
class Split:
    """How a replica's work and states are cut.

    ``zero``: the stage of ZeRO, 0 for none, over ``groups.shard``; ``microbatches``: pieces of a
    rank's share of a batch, worked on one after another; ``offload``: optimizer state on the host.
    """

    zero: int = 0
    microbatches: int = 1
    offload: bool = False
    groups: Groups = field(default_factory=Groups.alone)


def build_replica(
    model: nn.Module,
    objective: Objective,
    numerics: Numerics,
    *,
    group: Group,
    seed: int,
    normalize_over: int | None = None,
    split: Split | None = None,
    recompute: bool = False,
    compiled: bool = False,
) -> Replica:
    """Prepare `model` for training as one whole replica on this rank.

    ``normalize_over``: examples in a statistics group, None for the whole global batch; ``group``:
    the replicas whose rows make up the global batch; ``split``: what is cut, see `Split`. Raises
    `Refused` for what the model or the machine cannot do.
    """
    split = split or Split()
    if split.microbatches > 1 and normalize_over is None:
        refuse_batch_norm(model, split.microbatches)
    groups = BatchGroups(normalize_over, group)
    # One rank whose group is the whole batch keeps torch's own layers: nothing differs.
    if group.size > 1 or normalize_over is not None or recompute:
        use_groups(model, groups)
    key = StepKey(seed)
    use_counted_dropout(model, key)
    if recompute:
        use_recompute(model, groups, key)
    if numerics.channels_last:
        # torch's fully_shard cuts weights in the usual order only: there, inputs alone are so.
        if split.zero < 2:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if next(model.parameters()).device.type == "cpu":
            use_products(model)
    # The user's own model may be compiled in part; then the compiler is there by now.
    if compiled or "torch._dynamo" in sys.modules:
        # Collectives within the network.
        keep_uncompiled(GroupBatchNorm, "normalise_across")
        keep_masks_uncompiled()
    if compiled:
        _require_compiler()
        # Not dynamic: a graph that torch has generalised after the first partial batch would serve
        # later whole ones, and a resumed run, which has not seen it, would round differently.
        # What the compiler leaves to the interpreter has its masks by the key, from the first pass
        # on: graphs are good for one way of running only.
        key.intercepts = True
        model.compile(dynamic=False, backend=counting_backend)
    body = Body(model, objective, numerics, key)
    about = of_zero(split.zero, list(model.parameters()), split.groups.shard.size)
    states = shard(split.zero, body, model, split.groups, offload=split.offload)
    return Replica(body, numerics, groups, key, states, split.microbatches, about)


def _require_compiler() -> None:
    found = any(shutil.which(compiler) for compiler in ("g++", "clang++"))
    if not found and not torch.cuda.is_available():
        raise Refused(
            "compile: torch.compile needs a C++ compiler on this machine, and there is none",
            hint="Install g++ (Debian: `apt-get install g++`), or leave +compile out.",
        )
