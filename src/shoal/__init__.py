"""Shoal trains one PyTorch model on many devices and proves that the split is right.

    run = shoal.train(shoal.Recipe.from_yaml("recipes/digits.yaml"), strategy="dp2")
    certificate = shoal.verify(model_fn=…, batch_fn=…, loss_fn=…, strategy="dp2")

Names are imported when they are used: values and plans need no torch.
"""

from typing import TYPE_CHECKING, Any

from shoal.version import __version__

if TYPE_CHECKING:
    from shoal import errors
    from shoal.cluster import Cluster
    from shoal.predict import export, predict
    from shoal.recipe import Recipe
    from shoal.run import Run
    from shoal.strategy import Strategy
    from shoal.train import train
    from shoal.verify import Certificate, verify

__all__ = [
    "Certificate",
    "Cluster",
    "Recipe",
    "Run",
    "Strategy",
    "__version__",
    "errors",
    "export",
    "predict",
    "train",
    "verify",
]

_HOMES = {
    "Certificate": "shoal.verify",
    "Cluster": "shoal.cluster",
    "Recipe": "shoal.recipe",
    "Run": "shoal.run",
    "Strategy": "shoal.strategy",
    "export": "shoal.predict",
    "predict": "shoal.predict",
    "train": "shoal.train",
    "verify": "shoal.verify",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "errors":
        return import_module("shoal.errors")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *globals()])
