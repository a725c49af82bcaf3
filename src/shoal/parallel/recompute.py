"""Recompute activations block by block in the backward pass, instead of keeping them.

A block is a child of the model's outermost containers (`nn.Sequential`, `nn.ModuleList`) that holds
parameters; memory falls to one block's activations plus the blocks' inputs, for one more forward.
"""

import contextlib
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from shoal.errors import Refused
from shoal.parallel.statistics import BatchGroups


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, outermost containers first."""
    blocks: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            blocks.extend(
                inner
                for inner in child.children()
                if any(True for _ in inner.parameters()) and any(True for _ in inner.children())
            )
        else:
            blocks.extend(find_blocks(child))
    return blocks


def use_recompute(model: nn.Module, groups: BatchGroups) -> int:
    """Recompute each block of `model` in the backward pass; how many blocks there are."""
    blocks = find_blocks(model)
    if not blocks:
        raise Refused(
            "recompute: this model has no blocks (children of an nn.Sequential or nn.ModuleList)",
            hint="Leave +recompute out, or group the model's layers into an nn.Sequential.",
        )

    def contexts() -> tuple[Any, Any]:
        # Statistics must not be counted a second time when a block runs again.
        return contextlib.nullcontext(), groups.recomputation()

    for block in blocks:
        _wrap(block, contexts)
    return len(blocks)


def _wrap(block: nn.Module, contexts: Any) -> None:
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    block.forward = forward  # type: ignore[method-assign]
