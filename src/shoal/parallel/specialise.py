"""Give layers of a model other behaviour, and leave everything else about them as it is.

    specialise(model.bn1, GroupBatchNorm)      # isinstance(model.bn1, nn.BatchNorm2d) still holds

The layer itself changes its class: its parameters, buffers, hooks and names, and every reference to
it (a shared layer, a plain list in the user's module), stay.
"""

import functools
from typing import Any

import torch
from torch import nn


@functools.cache
def specialised(behaviour: Any, original: Any) -> Any:
    """The class with what `behaviour` overrides, and all else from `original`."""
    return type(original.__name__, (behaviour, original), {})


def specialise(layer: nn.Module, behaviour: type[nn.Module]) -> None:
    """Make `layer` an instance of `behaviour` as well."""
    # A class can be hashed, whatever mypy makes of its instances' __hash__.
    layer.__class__ = specialised(behaviour, type(layer))  # type: ignore[arg-type]


@functools.cache
def keep_uncompiled(behaviour: type[nn.Module], method: str) -> None:
    """Have torch's compiler leave a graph for this method of a class, and come back after it.

    To be called once something may be compiled. A decorator would import the compiler with this
    package, which takes as long as torch itself: a second of every rank's start.
    """
    plain = getattr(behaviour, method)
    setattr(behaviour, method, torch.compiler.disable(plain))  # type: ignore[no-untyped-call]
