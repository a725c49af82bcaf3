"""Optimizers: torch's own, over two groups of parameters where some are not to decay.

    group 0   weights                      weight_decay as given
    group 1   no_decay: bias, norm         weight_decay 0

    optimizer = build_optimizer(component, model)
    norm = clip_norm_of(component)              # None: no clipping

Tied parameters are one, frozen ones are left out, and each group remembers its learning rate before
any schedule as ``initial_lr``. Clipping is the training step's, by the whole model's norm: torch's
optimizers never see ``clip_norm``.
"""

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import SGD, Adam, AdamW, Optimizer

from shoal.errors import Refused, UsageError
from shoal.recipe.component import is_import_path, thaw
from shoal.recipe.user import Named, call, check_options, load, unknown

_OURS = ("clip_norm", "no_decay")
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


def build_optimizer(component: Named, module: nn.Module) -> Optimizer:
    """The optimizer that a recipe names, over the parameters of ``module`` that can be trained.

    Built in: sgd, adam, adamw, fused where torch has it for the devices and types of the
    parameters, else over lists of tensors. The user's own, ``fn(params, **options)``, gets an
    iterable of parameters, or of two groups if ``no_decay`` is given.
    Raises UsageError for a name or an import that cannot be, options that the optimizer refuses,
    and a module with nothing to train.
    """
    options = {key: value for key, value in thaw(component.options).items() if key not in _OURS}
    groups = parameter_groups(module, component.options.get("no_decay") or ())
    if is_import_path(component.name):
        optimizer = _users(component.name, groups, options)
    else:
        optimizer = _built_in(component.name, groups, options)
    for group in optimizer.param_groups:
        if "lr" in group:
            group.setdefault("initial_lr", group["lr"])
    return optimizer


_ELEMENT_WISE = tuple(
    getattr(torch.optim, name)
    for name in (
        "ASGD",
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    )
)


def check_cut(optimizer: Optimizer) -> tuple[str, ...]:
    """What to warn of where `optimizer` updates pieces of parameters; nothing for most.

    A piece is updated as it would be within the whole by optimizers that treat every element by
    itself. Raises Refused for torch's others (Adafactor, LBFGS, Muon, SparseAdam); of a user's own
    nobody can know.
    """
    kind = type(optimizer)
    step = inspect.unwrap(kind.step)
    if any(issubclass(kind, each) and inspect.unwrap(each.step) is step for each in _ELEMENT_WISE):
        return ()
    if kind.__module__.startswith("torch.optim"):
        raise Refused(
            f"{kind.__name__} computes with whole parameters, and here ranks keep pieces of them",
            hint="Use an optimizer that treats every element by itself (sgd, adam, adamw, …), or a "
            "strategy that cuts no parameter or state: dp without zero.",
        )
    return (
        f"optimizer {kind.__name__}: ranks keep pieces of parameters, which gives the same updates "
        "only if it treats every element by itself. `shoal verify` tells",
    )


def check_parted(optimizer: Optimizer) -> tuple[str, ...]:
    """What to warn of where ranks keep whole parameters, each some of the model's.

    All of torch's that need no closure treat every parameter by itself.
    """
    if type(optimizer).__module__.startswith("torch.optim"):
        return ()
    kind = type(optimizer)
    step = inspect.unwrap(kind.step)
    if any(issubclass(kind, each) and inspect.unwrap(each.step) is step for each in _ELEMENT_WISE):
        return ()
    return (
        f"optimizer {kind.__name__}: each rank has the parameters of its stages alone, which gives "
        "the same updates only if it treats every parameter by itself. `shoal verify` tells",
    )


def clip_norm_of(component: Named) -> float | None:
    """The norm to which the whole model's gradient is clipped; None for no clipping."""
    given = component.options.get("clip_norm")
    return None if given is None else float(given)


def parameter_groups(module: nn.Module, no_decay: Iterable[str]) -> list[dict[str, Any]]:
    """Groups for an optimizer: what decays, then what does not; an empty one is left out.

    ``no_decay``: "bias" is every parameter of that name, "norm" every parameter of a normalisation
    module (torch's, and any with Norm in its class's name; not those of its submodules).
    Raises UsageError if nothing can be trained, or for another word in ``no_decay``.
    """
    spared = _spared(module, tuple(no_decay))
    decaying: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for _, parameter in module.named_parameters():
        if parameter.requires_grad:
            (other if id(parameter) in spared else decaying).append(parameter)
    if not decaying and not other:
        raise UsageError(
            f"nothing to train: no parameter of {type(module).__name__} requires a gradient",
            hint="Give a model with parameters, and leave requires_grad on for some of them.",
        )
    groups: list[dict[str, Any]] = [{"params": decaying}] if decaying else []
    return [*groups, {"params": other, "weight_decay": 0.0}] if other else groups


def _spared(module: nn.Module, no_decay: tuple[str, ...]) -> set[int]:
    for word in no_decay:
        if word not in ("bias", "norm"):
            raise unknown(word, ("bias", "norm"), "kind of parameter in no_decay")
    spared = set()
    for owner in module.modules():
        is_norm = isinstance(owner, _NORMS) or "Norm" in type(owner).__name__
        for name, parameter in owner.named_parameters(recurse=False):
            if ("bias" in no_decay and name == "bias") or ("norm" in no_decay and is_norm):
                spared.add(id(parameter))
    return spared


def _built_in(name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    makers: dict[str, Any] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
    if name not in makers:
        raise unknown(name, makers, "optimizer")
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    check_options(makers[name], name, options, "optimizer", groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    how = {"fused": True} if can_be_fused(parameters) else {"foreach": True}
    try:
        made: Optimizer = without_compiler(makers[name])(groups, **options, **how)
    except ValueError as error:
        raise UsageError(f"optimizer {name!r}: {error}", hint="Change that option.") from error
    return made


@functools.cache
def without_compiler(kind: Any) -> Any:
    """A class like `kind`, torch's optimizer, that does not import torch's compiler.

    torch wraps these methods to keep its compiler out of them, and the wrappers import it at their
    first call: a second of every rank's start, and 70 MiB, for runs that compile nothing. Here
    they are without. (A model may be compiled all the same; compiling these would be of no use.)
    """
    plain = {
        name: inspect.unwrap(getattr(kind, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    }
    # Two wrappers: the compiler's, and the one that calls hooks, which torch puts on by itself.
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), {**plain, "step": step, "__module__": kind.__module__})


def can_be_fused(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether torch has one kernel for a whole step over these: floating, on the CPU or on CUDA."""
    return all(
        parameter.is_floating_point() and parameter.device.type in _FUSED_DEVICES
        for parameter in parameters
    )


def _users(name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    function = load(name, "optimizer")
    grouped = any("weight_decay" in group for group in groups)
    parameters: list[Any] = groups if grouped else groups[0]["params"]
    check_options(function, name, options, "optimizer", parameters)
    optimizer = call(function, name, "optimizer", parameters, **options)
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"optimizer {name!r} returned a {type(optimizer).__name__}",
            hint="It must return a torch.optim.Optimizer.",
        )
    return optimizer
