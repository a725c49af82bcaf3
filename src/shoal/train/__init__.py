"""The training loop: step, evaluate, commit, stop; and the run that remembers it.

run = train(recipe, strategy="dp2")          # starts the ranks, shows progress, returns the run

Importing it is light: a command starts its ranks before it loads what it needs itself.
"""

from typing import TYPE_CHECKING, Any

from shoal.callable_module import make_callable
from shoal.train.call import train

if TYPE_CHECKING:
    from shoal.train.ended import Ended
    from shoal.train.folder import Options
    from shoal.train.front import train_with

__all__ = ["Ended", "Options", "train", "train_with"]

_HOMES = {"Ended": "ended", "Options": "folder", "train_with": "front"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"shoal.train.{_HOMES[name]}"), name)


make_callable(__name__, train)
