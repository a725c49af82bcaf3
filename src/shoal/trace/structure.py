"""Nested inputs and outputs as flat lists of tensors, and back.

    {"ids": a, "labels": None, "pair": (b, 3)}   →   [a, b]   and   its `Structure`

    structure, tensors = take_apart(value)
    structure.build(tensors) == value

Tuples, lists, dicts, named tuples, dataclasses (frozen ones too) and dict-like dataclasses such as
those of `transformers` need no registration. Whatever is neither a container nor a tensor is kept
as a constant; an object of another kind that holds tensors (a cache) becomes None and is named.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor


@dataclass
class Structure:
    """Where the tensors of a nested value go. Made by `take_apart`."""

    build_from: Callable[[Iterator[Tensor]], Any]
    count: int = 0
    dropped: list[str] = field(default_factory=list)  # kinds of objects that became None
    symbols: bool = False  # whether a leaf is a number that depends on the batch

    def build(self, tensors: list[Tensor]) -> Any:
        """The nested value with ``tensors`` in the places of those taken out."""
        return self.build_from(iter(tensors))


def take_apart(value: Any) -> tuple[Structure, list[Tensor]]:
    """The structure of a nested value and its tensors, in order of their places."""
    tensors: list[Tensor] = []
    structure = Structure(next)
    structure.build_from = _apart(value, tensors, structure)
    structure.count = len(tensors)
    return structure, tensors


Build = Callable[[Iterator[Tensor]], Any]


def _apart(value: Any, tensors: list[Tensor], notes: Structure) -> Build:
    if isinstance(value, Tensor):
        tensors.append(value)
        return next
    if isinstance(value, SymInt | SymFloat | SymBool):
        notes.symbols = True
        return _constant(None)
    if isinstance(value, type):
        return _constant(value)
    if is_dataclass(value):
        return _object(value, tensors, notes)
    if isinstance(value, dict):
        keys = list(value)
        parts = [_apart(value[key], tensors, notes) for key in keys]
        return _mapping(value, keys, parts)
    if isinstance(value, tuple | list):
        parts = [_apart(item, tensors, notes) for item in value]
        return _sequence(type(value), parts)
    if _holds_tensors(value):
        notes.dropped.append(type(value).__name__)
        return _constant(None)
    return _constant(value)


def _constant(value: Any) -> Build:
    return lambda tensors: value


def _sequence(kind: type, parts: list[Build]) -> Build:
    if hasattr(kind, "_fields"):  # a named tuple
        return lambda tensors: kind(*[part(tensors) for part in parts])
    if issubclass(kind, tuple):
        return lambda tensors: tuple(part(tensors) for part in parts)
    return lambda tensors: [part(tensors) for part in parts]


def _mapping(value: Mapping[Any, Any], keys: list[Any], parts: list[Build]) -> Build:
    kind: Any = type(value)

    def build(tensors: Iterator[Tensor]) -> Any:
        made = {key: part(tensors) for key, part in zip(keys, parts, strict=True)}
        if kind is dict:
            return made
        # A subclass may want other arguments (defaultdict, BatchEncoding).
        try:
            return kind(made)
        except (TypeError, ValueError):
            return made

    return build


def _object(value: Any, tensors: list[Tensor], notes: Structure) -> Build:
    """A dataclass. Made anew field by field, without its constructor: that may compute."""
    names = [part.name for part in fields(value) if hasattr(value, part.name)]
    parts = [_apart(getattr(value, name), tensors, notes) for name in names]
    if isinstance(value, dict):  # transformers' ModelOutput: a dict that is a dataclass
        kind = type(value)
        return lambda tensors: kind(
            **{name: part(tensors) for name, part in zip(names, parts, strict=True)}
        )
    others = {
        key: item
        for key, item in getattr(value, "__dict__", {}).items()
        if key not in names and not isinstance(item, Tensor)
    }
    kind = type(value)

    def build(tensors: Iterator[Tensor]) -> Any:
        made = object.__new__(kind)
        for key, item in others.items():
            object.__setattr__(made, key, item)
        for name, part in zip(names, parts, strict=True):
            object.__setattr__(made, name, part(tensors))
        return made

    return build


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth == 0 or isinstance(value, type):
        return False
    if isinstance(value, dict):
        return any(_holds_tensors(item, depth - 1) for item in value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds_tensors(item, depth - 1) for item in value)
    return any(_holds_tensors(item, depth - 1) for item in getattr(value, "__dict__", {}).values())
