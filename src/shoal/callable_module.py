"""Packages that are also verbs: `shoal.train(recipe)` calls, `shoal.train.front` is a room in it.

Python binds a package's name in its parent when the package is imported, over any function of that
name. So the package itself is made callable, and it does not matter which of the two was bound.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(name: str, function: Callable[..., Any]) -> None:
    """Let the module called `name` be called as `function`."""

    class _Verb(ModuleType):
        __call__ = staticmethod(function)
        __doc__ = sys.modules[name].__doc__

    sys.modules[name].__class__ = _Verb
