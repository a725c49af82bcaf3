"""One named part of a recipe with its options: built in and checked, or the user's own.

    component = read("optimizer", {"name": "sgd", "lr": 0.1})
    component.options["momentum"]        # 0.0: defaults are filled in
    component.to_value()                 # {'name': 'sgd', 'weight_decay': 0.0, …}

In a file a component is its name, or a mapping with `name` and its options.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    model_serializer,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from shoal.recipe.components import SIGNATURES, Role, Signature
from shoal.yaml_source import KeyPath, nearest

_OWN_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*(\.[^\W\d]\w*)*)?")


class Options(Mapping[str, Any]):
    """A mapping that can't be changed, nor anything inside it; `==` to a dict of the same items."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = {key: _freeze(value) for key, value in items.items()}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Options(value)
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def thaw(value: Any) -> Any:
    """Plain dicts and lists of what :class:`Options` holds, a fresh copy each time."""
    if isinstance(value, Mapping):
        return {key: thaw(each) for key, each in value.items()}
    return [thaw(each) for each in value] if isinstance(value, list | tuple) else value


class Component(BaseModel):
    """A model, objective, optimizer or schedule by name.

    ``options`` of a built-in one are complete and checked once it is in a recipe; those of the
    user's own are as given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str
    options: Annotated[Mapping[str, Any], AfterValidator(Options)] = Options({})

    @property
    def builtin(self) -> bool:
        """Whether this is one of Shoal's own: the name is no import path."""
        return not is_import_path(self.name)

    def arguments(self) -> dict[str, Any]:
        """The options as a fresh dict of plain lists and dicts, to call a function with."""
        return {name: thaw(value) for name, value in self.options.items()}

    @model_serializer
    def to_value(self) -> str | dict[str, Any]:
        """What a file says: the name alone where there are no options."""
        return {"name": self.name, **self.arguments()} if self.options else self.name


def is_import_path(name: str) -> bool:
    """Whether a name means the user's own code, as `my_package.models:build` does."""
    return "." in name or ":" in name


def fail(path: KeyPath, message: str, given: Any) -> NoReturn:
    """Refuse a value inside the one that is being read: pydantic puts ``path`` behind its own."""
    # The text goes in as a parameter because braces in it would be read as a template.
    kind = PydanticCustomError("recipe", "{text}", {"text": message})
    raise ValidationError.from_exception_data(
        "recipe", [InitErrorDetails(type=kind, loc=path, input=given)]
    )


def read(role: Role, value: Any) -> Component:
    """A component from its name, from a mapping with `name` and options, or from a component.

    Raises ValidationError with every mistake in it.
    """
    name, options = _parts(role, value)
    if not is_import_path(name):
        signature = signature_of(role, name)
        if signature is None:
            _refuse_name(role, name, value)
        return Component(name=name, options=signature.model_validate(options).options())
    if not _OWN_NAME.fullmatch(name):
        message = "must be an import path, as in 'my_package.models:build'"
        fail(() if isinstance(value, str) else ("name",), message, name)
    for key, option in options.items():
        _check_plain(option, (key,))
    return Component(name=name, options=options)


def reader(role: Role) -> BeforeValidator:
    """:func:`read` for one role, as what pydantic calls on a field."""
    return BeforeValidator(lambda value: read(role, value))


def signature_of(role: Role, name: object) -> type[Signature] | None:
    """The options that a built-in component takes; None if there is none of that name."""
    return SIGNATURES[role].get(name) if isinstance(name, str) else None


def name_of(value: Any) -> object:
    """The name in any form of a component; None if it has none."""
    if isinstance(value, Component):
        return value.name
    return value.get("name") if isinstance(value, Mapping) else value


def _parts(role: Role, value: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(value, Component):
        return value.name, value.arguments()
    if isinstance(value, str):
        return value, {}
    if callable(value):
        raise ValueError("must be the import path of a function, as in 'my_package.models:build'")
    if not isinstance(value, Mapping):
        known = ", ".join(SIGNATURES[role])
        raise ValueError(
            f"must be a name, or a mapping with `name` and its options (known: {known})"
        )
    options = {key: thaw(option) for key, option in value.items()}
    for key in options:
        if not (isinstance(key, str) and key.isidentifier()):
            fail((str(key),), "can't be an option: it is not the name of an argument", key)
    name = options.pop("name", None)
    if not isinstance(name, str):
        state = "is missing" if "name" not in value else "must be a name"
        fail(("name",), f"{state} (known: {', '.join(SIGNATURES[role])})", name)
    return name, options


def _refuse_name(role: Role, name: str, value: Any) -> NoReturn:
    hint = nearest(name, list(SIGNATURES[role]))
    own = "one of your own is an import path, as in 'my_package.models:build'"
    fail(
        () if isinstance(value, str) else ("name",),
        f"is not a built-in {role}: {hint} ({own})",
        name,
    )


def _check_plain(value: Any, path: KeyPath) -> None:
    """Refuse what JSON and YAML can't hold: it would be lost on its way to the ranks."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not isinstance(key, str):
                fail((*path, str(key)), "must be text: it is the name of a key", key)
            _check_plain(each, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            _check_plain(each, (*path, index))
    elif isinstance(value, float) and not math.isfinite(value):
        fail(path, "must be a finite number", str(value))
    elif not isinstance(value, str | int | float | None):
        kinds = "text, a number, true, false, null, a list or a mapping"
        fail(path, f"must be {kinds}, given {value!r}", repr(value))
