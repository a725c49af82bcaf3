"""What a user writes with torch to train one model on two ranks: FSDP2, DTensor, pipelining.

    program = fully_sharded(model, group, keep=False)
    loss = program(inputs, targets)            # one training step on this rank

Fused AdamW, gradients set to None, the mean of the batch's losses. Each is for a model of `Gpt`
(blocks in a list, heads counted by their width, as tensor parallelism's users must write them) or a
list of layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

LR = 3e-4
Program = Callable[[Tensor, Tensor], Tensor | None]


class Block(nn.Module):
    """Attention and a perceptron; the number of heads follows from the width of what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.each = width // heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.before(x)
        query, key, value = (
            project(seen).unflatten(-1, (-1, self.each)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.widen(self.between(x))))


class Embed(nn.Module):
    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.places(torch.arange(ids.shape[1]))


class Gpt(nn.Module):
    """Token ids [n, L] to logits [n, L, vocabulary]; nothing is tied."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.embed = Embed(vocabulary, length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def layers(self) -> list[nn.Module]:
        return [self.embed, *self.blocks, self.norm, self.head]


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over all that is predicted."""
    return functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)


def _plain(model: nn.Module) -> Program:
    """Zero the gradients, forward, backward, update."""
    optimizer = adamw(model)

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def fully_sharded(model: Any, group: dist.ProcessGroup, *, keep: bool) -> Program:
    """FSDP2: each block, and the rest. ``keep``: whole until the backward pass is done (ZeRO 2)."""
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, "cpu")
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=not keep)
    fully_shard(model, mesh=mesh, reshard_after_forward=not keep)
    return _plain(model)


def tensor_parallel(model: Any, group: dist.ProcessGroup) -> Program:
    """DTensor: attention by heads, the perceptron by its inner width; the rest is on all ranks."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = DeviceMesh.from_group(group, "cpu")
    columns = ("query", "key", "value", "widen")
    for block in model.blocks:
        plan: dict[str, Any] = {name: ColwiseParallel() for name in columns}
        plan |= {name: RowwiseParallel() for name in ("out", "narrow")}
        parallelize_module(block, mesh, plan)
    cut = [p for p in model.parameters() if hasattr(p, "placements")]
    whole = [p for p in model.parameters() if not hasattr(p, "placements")]
    # Not one list: torch's fused update takes no mixture of DTensors and plain ones.
    return _two_optimizers(model, cut, whole)


def _two_optimizers(model: nn.Module, *parts: Sequence[nn.Parameter]) -> Program:
    optimizers = [torch.optim.AdamW(part, lr=LR, fused=True) for part in parts]

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        for each in optimizers:
            each.zero_grad(set_to_none=True)
        loss = loss_of(model(inputs), targets)
        loss.backward()
        for each in optimizers:
            each.step()
        return loss.detach()

    return step


def pipelined(
    layers: Sequence[nn.Module],
    first_of_last: int,
    schedule: str,
    microbatches: int,
    group: dist.ProcessGroup,
) -> Program:
    """torch's pipelining, two stages, cut before layer `first_of_last`."""
    from torch.distributed import pipelining

    rank = dist.get_rank(group)
    own = layers[first_of_last:] if rank else layers[:first_of_last]
    module = nn.Sequential(*own)
    stage = pipelining.PipelineStage(module, rank, 2, torch.device("cpu"), group=group)
    kinds = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}
    plan = kinds[schedule](stage, microbatches, loss_fn=loss_of)
    optimizer = adamw(module)

    def step(inputs: Tensor, targets: Tensor) -> Tensor | None:
        optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        if rank:
            plan.step(target=targets, losses=losses)
        else:
            plan.step(inputs)
        optimizer.step()
        return torch.stack(losses).mean().detach() if losses else None

    return step
