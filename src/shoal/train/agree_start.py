"""Before step 1 the ranks compare what they start from; a difference ends the run, by name."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from shoal.comm import Group
from shoal.errors import NotFinite, RanksDiffer


def compare(group: Group, items: Mapping[str, Any]) -> None:
    """Raise `RanksDiffer` on every rank if `items` differ anywhere, naming rank and item.

    An item that is a mapping travels as a digest; where it differs, its first such key is named.
    """
    short = {name: _short(value) for name, value in items.items()}
    everywhere = group.all_gather_json(short, "start-up")
    for rank, theirs in enumerate(everywhere):
        for name in {**everywhere[0], **theirs}:
            ours, other = everywhere[0].get(name), theirs.get(name)
            if ours == other:
                continue
            if isinstance(items.get(name), Mapping):
                tables = group.all_gather_json(dict(items[name]), "start-up")
                key, ours, other = _first_difference(tables[0], tables[rank])
                name = f"{name}: {key}"
            raise RanksDiffer(
                f"{name} differs: rank 0 has {_said(ours)}, rank {rank} has {_said(other)}",
                hint="All ranks need the same program, recipe, strategy and data.",
                rank=rank,
                phase="start-up",
            )


def _short(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any]:
    keys = dict.fromkeys([*ours, *theirs])
    key = next(key for key in keys if ours.get(key) != theirs.get(key))
    return key, ours.get(key), theirs.get(key)


def _said(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def digest(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's values."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    values = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return xxhash.xxh3_128_hexdigest(values)


def model_digests(model: nn.Module) -> dict[str, str]:
    """A digest of each parameter and buffer, by qualified name."""
    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def describe_parameters(model: nn.Module) -> dict[str, str]:
    """Shape and type of each parameter and buffer, by qualified name."""
    return {
        name: f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in model.state_dict().items()
    }


def not_finite(model: nn.Module) -> frozenset[str]:
    """The names of parameters and buffers that hold NaN or infinity."""
    return frozenset(
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    )


def require_finite(model: nn.Module, step: int, never: Collection[str] = ()) -> None:
    """Raise `NotFinite` if a tensor is not, and is not among those that ``never`` were."""
    for name in sorted(not_finite(model) - set(never)):
        raise NotFinite(
            f"{name} holds values that are not finite",
            hint="This checkpoint is not written; earlier ones are good. Try a smaller "
            "optimizer.lr, or optimizer.clip_norm.",
            step=step,
            phase="checkpoint",
        )
