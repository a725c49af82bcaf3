"""Blocks that run as they are in a stage: their dropout and their batch norm made ours.

    use_blocks(traced, skeleton, key, groups, may_write=True)      # every block of traced.graph

A block's modules belong to it alone (`shoal.trace.blocks` sees to that), so the calls of its layers
are counted from 0 whenever it runs: for each microbatch, and again in the backward pass.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.nn.modules.batchnorm import _BatchNorm

from shoal.errors import Refused
from shoal.parallel.batch_groups import BatchGroups
from shoal.parallel.randomness import StepKey, replaying, use_counted_dropout
from shoal.parallel.statistics import use_groups
from shoal.trace import Block


class HasGraph(Protocol):
    """A traced graph, as far as it is needed here."""

    @property
    def graph(self) -> Graph: ...


def has_batch_norms(model: nn.Module) -> bool:
    """Whether a layer may use the statistics of a batch."""
    return any(isinstance(layer, _BatchNorm) for layer in model.modules())


def use_blocks(
    traced: HasGraph, model: nn.Module, key: StepKey, groups: BatchGroups, *, may_write: bool
) -> None:
    """Prepare the blocks of a graph, whose modules are those of `model`.

    ``may_write``: whether a forward pass may change buffers; not where it runs more than once.
    """
    use_groups(model, groups)
    use_counted_dropout(model, key)
    training = model.training
    for node in traced.graph.nodes:
        if isinstance(node.target, Block) and training:
            line = str(node.meta["line"])
            node.target = _Counted(node.target, key, groups, line, may_write)


@dataclass(eq=False)
class _Counted:
    """A block in training: the same masks and statistics wherever and however often it runs."""

    block: Block
    key: StepKey
    groups: BatchGroups
    line: str
    may_write: bool

    __name__ = "block"

    def __call__(self, *tensors: Tensor) -> Any:
        self.groups.count_calls_anew()
        before = None if self.may_write else [tensor._version for tensor in tensors]
        drawn = _drawn(tensors)
        with replaying(self.key, self.key.moment()._replace(calls={}, active=True)):
            result = self.block(*tensors)
        if not torch.equal(drawn, _drawn(tensors)):
            raise _draws(self.line)
        if before is not None:
            self._require_same(tensors, before)
        return result

    def _require_same(self, tensors: tuple[Tensor, ...], before: list[int]) -> None:
        state = list(zip(tensors, before, strict=True))[self.block.given.count :]
        for name, (tensor, version) in zip(self.block.names, state, strict=True):
            if tensor._version != version:
                raise Refused(
                    f"the forward pass changes {name.partition('.')[2]} of {self.line}, and "
                    "several microbatches, or a block that is computed again, would change it as "
                    "often",
                    hint="Use mb:1 without +recompute, or a strategy without pp.",
                )


def _drawn(tensors: tuple[Tensor, ...]) -> Tensor:
    """The state of the generators that random operations of the block move."""
    states = [torch.get_rng_state()]
    states += [
        torch.cuda.get_rng_state(device)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}
    ]
    return torch.cat(states)


def _draws(line: str) -> Refused:
    return Refused(
        f"{line} draws random numbers that would depend on how the model is cut",
        hint="Draw them before the model and give them as an input, or use dropout (layers, "
        "functions, attention's dropout_p), whose masks do not depend on the cut. Or train with a "
        "strategy of replicas alone (dp).",
    )
