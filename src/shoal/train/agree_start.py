"""Before step 1 the ranks compare what they start from; a difference ends the run, by name."""

import platform
from collections.abc import Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from shoal.comm import Group
from shoal.errors import NotFinite, RanksDiffer
from shoal.version import __version__


def versions() -> dict[str, str]:
    """What computes: versions of Shoal, torch and Python."""
    return {
        "shoal": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def compare(group: Group, items: Mapping[str, Any]) -> None:
    """Raise `RanksDiffer` on every rank if `items` differ anywhere, naming rank and item."""
    everywhere = group.all_gather_json(dict(items), "start-up")
    first = everywhere[0]
    for rank, other in enumerate(everywhere):
        for name in {**first, **other}:
            if first.get(name) != other.get(name):
                raise RanksDiffer(
                    f"{name} differs: rank 0 has {first.get(name)!r}, "
                    f"rank {rank} has {other.get(name)!r}",
                    hint="All ranks need the same program, recipe, strategy and data.",
                    rank=rank,
                    phase="start-up",
                )


def digest(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's values."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    values = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return xxhash.xxh3_128_hexdigest(values)


def model_digests(model: nn.Module) -> dict[str, str]:
    """A digest of each parameter and buffer, by qualified name."""
    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def describe_parameters(model: nn.Module) -> str:
    """A digest of names, shapes and types of all parameters and buffers."""
    text = "\n".join(
        f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in model.state_dict().items()
    )
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def require_finite(model: nn.Module, step: int) -> None:
    """Raise `NotFinite` if a parameter or buffer is not: such a checkpoint is of no use."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NotFinite(
                f"{name} holds values that are not finite",
                hint="This checkpoint is not written; earlier ones are good. Try a smaller "
                "optimizer.lr, or optimizer.clip_norm.",
                step=step,
                phase="checkpoint",
            )
