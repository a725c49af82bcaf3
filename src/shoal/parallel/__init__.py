"""Everything inside a replica, applied to a plain model from outside, in one written order.

    replica = build_replica(model, objective, numerics, group=groups.statistics, seed=0)

The order: batch statistics → dropout → recompute → memory format, products → compile. (Pipeline and
tensor parallelism will come before recompute, ZeRO after compile.)
"""

import shutil
import sys

import torch
from torch import nn

from shoal.comm import Group
from shoal.errors import Refused
from shoal.parallel.pointwise import use_products
from shoal.parallel.randomness import StepKey, use_counted_dropout
from shoal.parallel.randomness.compiling import counting_backend, keep_masks_uncompiled
from shoal.parallel.recompute import use_recompute
from shoal.parallel.replica import (
    Body,
    LocalBatch,
    Numerics,
    Objective,
    Replica,
    Share,
    Start,
    call_model,
    call_objective,
)
from shoal.parallel.specialise import keep_uncompiled
from shoal.parallel.statistics import BatchGroups, GroupBatchNorm, use_groups

__all__ = [
    "BatchGroups",
    "Body",
    "GroupBatchNorm",
    "LocalBatch",
    "Numerics",
    "Objective",
    "Replica",
    "Share",
    "Start",
    "build_replica",
    "call_model",
    "call_objective",
    "use_groups",
]


def build_replica(
    model: nn.Module,
    objective: Objective,
    numerics: Numerics,
    *,
    group: Group,
    seed: int,
    normalize_over: int | None = None,
    recompute: bool = False,
    compiled: bool = False,
) -> Replica:
    """Prepare `model` for training as one whole replica on this rank.

    ``normalize_over``: examples in a statistics group, None for the whole global batch; ``group``:
    the replicas whose rows make up the global batch. Raises `Refused` for what the model or the
    machine cannot do.
    """
    groups = BatchGroups(normalize_over, group)
    # One rank whose group is the whole batch keeps torch's own layers: nothing differs.
    if group.size > 1 or normalize_over is not None or recompute:
        use_groups(model, groups)
    key = StepKey(seed)
    use_counted_dropout(model, key)
    if recompute:
        use_recompute(model, groups, key)
    if numerics.channels_last:
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
    return Replica(Body(model, objective, numerics, key), numerics, groups, key)


def _require_compiler() -> None:
    found = any(shutil.which(compiler) for compiler in ("g++", "clang++"))
    if not found and not torch.cuda.is_available():
        raise Refused(
            "compile: torch.compile needs a C++ compiler on this machine, and there is none",
            hint="Install g++ (Debian: `apt-get install g++`), or leave +compile out.",
        )
