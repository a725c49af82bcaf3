"""Recompute activations block by block in the backward pass, instead of keeping them.

A block is the outermost module with parameters and parts of its own in a container (an
`nn.Sequential` or `nn.ModuleList`); memory falls to one block's activations plus the blocks'
inputs, for one more forward.

    use_recompute(model, groups, key)      # 8 for a ResNet-18: its residual units
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from shoal.errors import Refused
from shoal.parallel.batch_groups import BatchGroups
from shoal.parallel.randomness import Moment, StepKey, replaying, run_within


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, each once.

    Containers in containers are looked into; one that holds only single layers is a block itself.
    """
    return list(dict.fromkeys(_blocks(model, contained=False)))


def _blocks(module: nn.Module, *, contained: bool) -> Iterator[nn.Module]:
    children = list(module.children())
    container = _is_container(module)
    layers_only = not any(True for child in children for _ in child.children())
    if contained and children and (not container or layers_only):
        # A list of layers cannot be called, and a block without parameters is not worth the time.
        if not isinstance(module, nn.ModuleList) and any(True for _ in module.parameters()):
            yield module
        return
    for child in children:
        yield from _blocks(child, contained=container)


def _is_container(module: nn.Module) -> bool:
    """A Sequential or a list; a class derived from them with a forward of its own is a block."""
    forwards = (nn.Sequential.forward, nn.ModuleList.forward)
    return isinstance(module, nn.Sequential | nn.ModuleList) and type(module).forward in forwards


def use_recompute(model: nn.Module, groups: BatchGroups, key: StepKey) -> int:
    """Recompute each block of `model` in the backward pass; how many blocks there are.

    Raises `Refused` if there is none.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise Refused(
            "recompute: this model has no blocks (children of an nn.Sequential or nn.ModuleList)",
            hint="Leave +recompute out, or group the model's layers into an nn.Sequential.",
        )

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _again(groups, key, key.moment())

    for block in blocks:
        _wrap(block, contexts)
    return len(blocks)


@contextlib.contextmanager
def _again(groups: BatchGroups, key: StepKey, moment: Moment) -> Iterator[None]:
    """A block runs again: the same dropout masks, and statistics not counted a second time."""
    with groups.recomputation(), replaying(key, moment):
        yield


def _wrap(block: nn.Module, contexts: Callable[[], tuple[Any, Any]]) -> None:
    plain = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return plain(*args, **kwargs)
        options: dict[str, Any] = {"use_reentrant": False, "context_fn": contexts}
        # In the backward pass nobody calls the block, and yet it is the block that runs.
        return checkpoint(run_within, block, plain, *args, **options, **kwargs)

    block.forward = forward
