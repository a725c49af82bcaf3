"""Find and call what a recipe names by its import path: the user's own function or class.

    "my_package.models:build"     module my_package.models, attribute build
    "my_package.models.build"     the same
    "my_package.models:Net.tiny"  an attribute of an attribute

    build = load("my_package.models:build", "model")

What such code raises is the user's to see: UsageError before a call can be made, UserCodeError from
inside it.
"""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, Protocol

from shoal.errors import ShoalError, UsageError, UserCodeError


class Named(Protocol):
    """A component of a recipe: a name and its options (`shoal.recipe.Component` is one)."""

    @property
    def name(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Any]: ...


def unknown(name: str, known: Iterable[str], what: str) -> UsageError:
    """The error for a built-in name that does not exist, with the nearest that does."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return UsageError(
        f"unknown {what} {name!r}{guess}",
        hint=f"Known: {', '.join(choices)}.",
    )


def load(name: str, what: str) -> Callable[..., Any]:
    """The callable at ``name``; ``what`` (model, objective, …) is for the messages.

    Raises UsageError that names the module, the attribute and the nearest attribute.
    """
    module_name, _, path = name.partition(":") if ":" in name else name.rpartition(".")
    if not module_name or not path:
        raise UsageError(
            f"{what} {name!r} names no function", hint="Write it package.module:function."
        )
    found: Any = _module(module_name, name, what)
    for attribute in path.split("."):
        found = _attribute(found, attribute, name, what)
    if not callable(found):
        raise UsageError(
            f"{what} {name!r} is a {type(found).__name__}, which cannot be called",
            hint="Name a function or a class.",
        )
    return found  # type: ignore[no-any-return]  # narrowed by callable() from Any


def check_options(
    function: Callable[..., Any], name: str, options: Mapping[str, Any], what: str, *given: object
) -> None:
    """Raise UsageError unless ``function(*given, **options)`` is a legal call."""
    signature = signature_of(function)
    if signature is None:
        return
    try:
        signature.bind(*given, **options)
    except TypeError as error:
        raise UsageError(
            f"{what} {name!r}: {error}", hint=f"Its signature is {signature}."
        ) from error


def signature_of(function: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a callable; None for those in C that do not tell."""
    try:
        return inspect.signature(function)
    except ValueError:
        return None


def call(function: Callable[..., Any], name: str, what: str, *given: Any, **options: Any) -> Any:
    """Call the user's function; what it raises becomes a UserCodeError that says whose it is."""
    try:
        return function(*given, **options)
    except ShoalError:
        raise
    except Exception as error:
        raise UserCodeError(f"{what} {name!r} raised {type(error).__name__}: {error}") from error


def _module(module_name: str, name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ShoalError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise UsageError(
                f"{what} {name!r}: there is no module {missing!r}",
                hint="Install it, or put its folder on PYTHONPATH.",
            ) from error
        raise _failed(module_name, name, what, error) from error
    except Exception as error:
        raise _failed(module_name, name, what, error) from error


def _failed(module_name: str, name: str, what: str, error: Exception) -> UsageError:
    return UsageError(
        f"{what} {name!r}: importing {module_name} raised {type(error).__name__}: {error}",
        hint="Import the module in Python to see where.",
    )


def _attribute(owner: Any, attribute: str, name: str, what: str) -> Any:
    try:
        return getattr(owner, attribute)
    except AttributeError as error:
        owner_name = getattr(owner, "__name__", type(owner).__name__)
        public = [other for other in dir(owner) if not other.startswith("_")]
        near = difflib.get_close_matches(attribute, public, n=1)
        hint = (
            f"Did you mean {near[0]}?" if near else f"It has {', '.join(public[:8]) or 'nothing'}."
        )
        raise UsageError(
            f"{what} {name!r}: {owner_name} has no attribute {attribute!r}", hint=hint
        ) from error
