"""Models by name: the built-in ones, or the user's own function or class.

    component (name, options)  ×  what the data are (classes, channels, pixels)  →  nn.Module

    model = build(component, classes=10, in_channels=1, image_size=8)

A model is a plain single-device module; everything parallel is applied to it from outside.
"""

from typing import Any

from torch import nn

from shoal.errors import UsageError
from shoal.models.mlp import mlp
from shoal.models.resnet import ResNet, ResNetOptions
from shoal.models.transformer import Transformer, TransformerOptions
from shoal.recipe.component import is_import_path, thaw
from shoal.recipe.user import Named, call, check_options, load, signature_of, unknown

__all__ = ["ResNet", "ResNetOptions", "Transformer", "TransformerOptions", "build", "mlp"]


def build(
    component: Named, *, classes: int | None, in_channels: int | None, image_size: int | None
) -> nn.Module:
    """Make the model that a recipe names, on the CPU, in float32, in training mode.

    ``classes``, ``in_channels`` and ``image_size`` (pixels) are what the data have, None where
    they have no such thing; an option of the component goes before them. A model of the user's,
    ``fn(**options)``, gets classes and in_channels where its signature names them.
    Initial weights come from torch's default generator: seed it before.

    Raises UsageError for a name, an import or options that cannot be, UserCodeError for what the
    user's own function raises.
    """
    data = {"classes": classes, "in_channels": in_channels, "image_size": image_size}
    if is_import_path(component.name):
        return _build_users(component, data)
    makers = {"resnet": _resnet, "transformer": _transformer, "mlp": _mlp}
    if component.name not in makers:
        raise unknown(component.name, makers, "model")
    try:
        return makers[component.name](thaw(component.options), data)
    except TypeError as error:
        raise UsageError(f"model {component.name!r}: {error}") from error


def _resnet(options: dict[str, Any], data: dict[str, int | None]) -> nn.Module:
    options["classes"] = _required("resnet", "classes", options, data)
    options["in_channels"] = _required("resnet", "in_channels", options, data)
    return ResNet(ResNetOptions(**options, image_size=data["image_size"]))


def _transformer(options: dict[str, Any], data: dict[str, int | None]) -> nn.Module:
    options["classes"] = _required("transformer", "classes", options, data)
    return Transformer(TransformerOptions(**options))


def _mlp(options: dict[str, Any], data: dict[str, int | None]) -> nn.Module:
    options["classes"] = _required("mlp", "classes", options, data)
    channels = _required("mlp", "in_channels", {}, data)
    side = _required("mlp", "image_size", {}, data)
    return mlp(channels * side * side, **options)


def _required(model: str, key: str, options: dict[str, Any], data: dict[str, int | None]) -> int:
    given: int | None = options.get(key)
    value = data[key] if given is None else given
    if value is None:
        raise UsageError(
            f"model {model!r} needs {key}, and the data do not say",
            hint=f"Give model.{key}, or data that have it.",
        )
    return value


def _build_users(component: Named, data: dict[str, int | None]) -> nn.Module:
    function = load(component.name, "model")
    check = signature_of(function)
    named = {} if check is None else check.parameters
    options = {
        key: data[key]
        for key in ("classes", "in_channels")
        if key in named and data[key] is not None
    } | thaw(component.options)
    check_options(function, component.name, options, "model")
    model = call(function, component.name, "model", **options)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model {component.name!r} returned a {type(model).__name__}",
            hint="It must return a torch.nn.Module.",
        )
    return model
