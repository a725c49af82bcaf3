"""The mean of what replicas' optimizers keep of each parameter, number by number.

    momentum_r ← Σ_r share_r · momentum_r

    average_state(setting, share)                # as `average` does with weights

A replica that has had no examples yet has no state; it then takes the others', and a replica that
has not used a parameter counts as zeros. Step counters and the like are each replica's own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import RunError
from shoal.sync.average import average
from shoal.sync.meetings import Setting, trained

_DTYPES = {str(each): each for each in (torch.float64, torch.float32, torch.bfloat16)}


def average_state(setting: Setting, share: float) -> None:
    """Average the optimizer's state over the replicas. Collective over ``between``."""
    if setting.between.size == 1:
        return
    weights = trained(setting.model)
    _complete(setting, weights)
    found = []
    for parameter in weights.values():
        kept = setting.optimizer.state.get(parameter, {})
        found += [kept[key] for key in sorted(kept) if is_like(key, kept[key], parameter)]
    average(found, share, setting.between)


def is_like(key: str, value: object, parameter: Tensor) -> bool:
    """Whether a value of the state is one number for each of the parameter's."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.shape == parameter.shape and (value.dim() > 0 or key != "step")


def _complete(setting: Setting, weights: dict[str, nn.Parameter]) -> None:
    """Give this replica's optimizer the state that only others have, zeros in place of numbers."""
    state = setting.optimizer.state
    own = {
        name: {key: _described(key, value, parameter) for key, value in state[parameter].items()}
        for name, parameter in weights.items()
        if state.get(parameter)
    }
    everywhere = setting.between.all_gather_json(own, "agreement")
    for name, parameter in weights.items():
        described = next((each[name] for each in everywhere if name in each), None)
        if described is None or state.get(parameter):
            continue
        state[parameter] = {key: _made(value, parameter) for key, value in described.items()}


def _described(key: str, value: Any, parameter: Tensor) -> Any:
    if is_like(key, value, parameter):
        return {"like": str(value.dtype)}
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise RunError(
                f"state=average: the optimizer keeps {key!r} of shape {list(value.shape)} of a "
                f"parameter of shape {list(parameter.shape)}",
                hint="Only state of the parameter's own shape can be averaged: leave "
                "state=average out.",
            )
        there = value.device == parameter.device  # step counters may be on the host
        return {"number": value.item(), "dtype": str(value.dtype), "there": there}
    return {"plain": value}


def _made(described: Any, parameter: Tensor) -> Any:
    if "like" in described:
        dtype = _DTYPES.get(described["like"], parameter.dtype)
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    if "plain" in described:
        return described["plain"]
    dtype = _DTYPES.get(described["dtype"], torch.float32)
    device = parameter.device if described["there"] else "cpu"
    return torch.tensor(described["number"], dtype=dtype, device=device)
