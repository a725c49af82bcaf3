"""An optimizer's state as named tensors and JSON, and back, bit for bit.

    tensors   {"fc.weight/exp_avg": …, "fc.weight/step": …}
    scalars   {"groups": [{"names": ["fc.weight"], "options": {"lr": 0.1, …}}],
               "state": {"fc.weight/count": 3}}

The names are those of parameters, so the state can be cut and put together like the parameters
themselves. What the run was computed with (`fused`, `foreach`, …) is the present optimizer's
business and is neither saved nor restored.

    tensors, scalars = flatten(optimizer, names)
    restore(other_optimizer, other_names, tensors, scalars)
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from shoal.errors import RunError

_NOT_SAVED = {"params", "param_names", "foreach", "fused", "capturable", "differentiable"}


def flatten(
    optimizer: Optimizer, names: Mapping[Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state by ``name/key`` and the rest as JSON. The tensors are the optimizer's own.

    Raises `RunError` that names a value which is neither a tensor nor a number, and ValueError for
    a parameter without a name.
    """
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    for parameter, values in optimizer.state.items():
        name = _name(parameter, names)
        for key, value in values.items():
            if not isinstance(key, str) or "/" in key:
                raise _unsaveable(optimizer, f"state {key!r} of {name}", "has no plain name")
            path = f"{name}/{key}"
            if isinstance(value, Tensor):
                tensors[path] = value.detach()
            elif value is None or isinstance(value, (bool, int, float)):
                state[path] = _encode(value)
            else:
                raise _unsaveable(optimizer, f"state {key!r} of {name}", f"is a {_kind(value)}")
    for clash in tensors.keys() & set(names.values()):
        raise _unsaveable(optimizer, f"state {clash}", "has the name of a parameter")
    groups = [_group(optimizer, group, names) for group in optimizer.param_groups]
    return tensors, {"groups": groups, "state": state}


def restore(
    optimizer: Optimizer,
    names: Mapping[Parameter, str],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Put the state of :func:`flatten` into an optimizer of the same kind and the same groups.

    It may hold fewer parameters than were saved (one stage's of a pipeline). Tensors are copied to
    the parameters' devices, in their own types and with the parameters' strides where the shapes
    are equal: kernels may round differently over different strides.
    Raises `RunError` where the groups are not those that were saved.
    """
    chosen = [
        _saved_group(group, names, [*scalars["groups"][index : index + 1], *scalars["groups"]])
        for index, group in enumerate(optimizer.param_groups)
    ]
    by_name: dict[str, dict[str, Any]] = {}
    for path, value in {**tensors, **scalars["state"]}.items():
        name, _, key = path.rpartition("/")
        by_name.setdefault(name, {})[key] = value
    for group, options in zip(optimizer.param_groups, chosen, strict=True):
        for key, value in options.items():
            group[key] = _decode(value, group.get(key))
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)
            saved = by_name.get(_name(parameter, names), {})
            if saved:
                optimizer.state[parameter] = {
                    key: _place(key, value, parameter, group) for key, value in saved.items()
                }


def _group(
    optimizer: Optimizer, group: Mapping[str, Any], names: Mapping[Parameter, str]
) -> dict[str, Any]:
    options = {}
    for key, value in group.items():
        if key in _NOT_SAVED:
            continue
        try:
            options[key] = _encode(value)
        except TypeError as error:
            raise _unsaveable(optimizer, f"option {key!r}", f"is a {error}") from error
    return {"names": [_name(p, names) for p in group["params"]], "options": options}


def _saved_group(
    group: Mapping[str, Any], names: Mapping[Parameter, str], saved: list[Mapping[str, Any]]
) -> Mapping[str, Any]:
    """The options of the first saved group that has this one's names; its own index comes first,
    since a group that is empty on this rank fits anywhere.
    """
    mine = {_name(parameter, names) for parameter in group["params"]}
    for candidate in saved:
        if mine <= set(candidate["names"]):
            options: Mapping[str, Any] = candidate["options"]
            return options
    known = {name for candidate in saved for name in candidate["names"]}
    unknown = sorted(mine - known)
    raise RunError(
        f"the checkpoint has no optimizer state for {unknown[0]}"
        if unknown
        else "the optimizer's groups of parameters are not those of the checkpoint",
        hint="the model and the optimizer must be those that were saved",
    )


def _place(key: str, value: Any, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    if not isinstance(value, Tensor):
        return _decode(value, None)
    if value.shape == parameter.shape and value.dim() > 0:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    # torch reads step counters on the host, unless the update runs without it.
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return value.to("cpu" if on_host else parameter.device, copy=True)


def _encode(value: Any) -> Any:
    """JSON of an option; raises TypeError with the name of a type that cannot be one."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return _encode(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(_kind(value))


def _decode(value: Any, present: Any) -> Any:
    """The option again, in the form that the optimizer has it in: a tuple, a tensor, …"""
    if isinstance(value, dict):
        value = float(value["float"])
    if isinstance(value, list):
        items = [_decode(item, None) for item in value]
        return tuple(items) if isinstance(present, tuple) else items
    if isinstance(present, Tensor):
        return torch.full_like(present, value)
    return value


def _name(parameter: Any, names: Mapping[Parameter, str]) -> str:
    if parameter not in names:
        raise ValueError(f"a parameter of shape {tuple(parameter.shape)} has no name")
    return names[parameter]


def _kind(value: Any) -> str:
    return type(value).__name__


def _unsaveable(optimizer: Optimizer, what: str, why: str) -> RunError:
    return RunError(
        f"the optimizer {_kind(optimizer)} cannot be saved: {what} {why}",
        hint="use an optimizer whose state is tensors and numbers, one for each name",
    )
