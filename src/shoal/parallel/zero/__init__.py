"""ZeRO: what replicas would all keep, kept in pieces by the ranks of a shard group.

                    parameters     gradients    optimizer state
    zero1           whole          whole        rows
    zero2           rows; whole    rows         rows              whole from the forward pass
                    in a step                                     to the end of the backward pass
    zero3           rows; whole    rows         rows              block by block
                    where used

    states = shard(Zero(3), body, model, groups)      # cuts the model in place
    states.holding, states.layout(layout)             # plain tensors, under the user's names

Everything is cut along dimension 0, as torch.chunk does (Rajbhandari et al. 2020 cut a flat vector,
which would make every checkpoint depend on the order of parameters).
"""

from collections.abc import Sequence

from torch import nn

from shoal.comm import Groups
from shoal.parallel.hooks import refuse_hooks
from shoal.parallel.zero.gathered import GatheredRows
from shoal.parallel.zero.offload import Offloaded
from shoal.parallel.zero.optimizer_rows import OptimizerRows
from shoal.parallel.zero.persistent import Persistent, persistent
from shoal.parallel.zero.states import States, Whole

__all__ = [
    "GatheredRows",
    "Offloaded",
    "Persistent",
    "States",
    "Whole",
    "of_zero",
    "persistent",
    "shard",
]


def shard(
    stage: int,
    root: nn.Module,
    model: nn.Module,
    groups: Groups,
    *,
    offload: bool = False,
    traced: GatheredRows | None = None,
) -> States:
    """Cut the parameters of `model` among the ranks of ``groups.shard``, as ZeRO `stage` does.

    ``stage`` 0 cuts nothing. ``root``: the module that is called, with `model` in it; only the
    stages 2 and 3 need to know. ``offload``: the optimizer's state, and the copies of parameters
    that it updates, in the host's memory; on the CPU that changes nothing. ``traced``: what the
    graphs of a traced model gather from, for the stages 2 and 3 of one.
    """
    states: States
    if stage > 1 and groups.shard.size > 1:
        refuse_hooks(dict(model.named_parameters()), f"zero{stage}")
    if stage == 0 or groups.shard.size == 1:
        states = Whole(model)
    elif stage == 1:
        states = OptimizerRows(model, groups.shard)
    elif traced is not None:
        traced.cut(model)
        states = traced
    else:
        # torch's fully_shard takes most of a second to import.
        from shoal.parallel.zero.fully_sharded import FullySharded

        states = FullySharded(root, model, groups, keep=stage == 2)
    return Offloaded(states) if offload and groups.device.type != "cpu" else states


_CUTS = {
    1: "the optimizer's state",
    2: "gradients, the optimizer's state, and between steps parameters",
    3: "parameters, gradients and the optimizer's state",
}


def of_zero(stage: int, parameters: Sequence[nn.Parameter], ranks: int) -> tuple[str, ...]:
    """What is cut, in words; ``parameters`` as they were before that, over ``ranks``."""
    if stage == 0 or ranks == 1:
        return ()
    trained = [each for each in parameters if each.requires_grad or stage > 1]
    cut = [each for each in trained if each.dim()]
    few = sum(each.shape[0] < ranks for each in cut)
    lines = [
        f"zero{stage}: {_CUTS[stage]} by rows over {ranks} ranks, for {len(cut)} of "
        f"{len(parameters)} parameters"
    ]
    if few:
        lines.append(
            f"zero{stage}: {few} of them have fewer rows than there are ranks, and some ranks keep "
            "none of these"
        )
    return tuple(lines)
