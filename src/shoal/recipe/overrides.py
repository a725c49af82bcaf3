"""`--set key=value` on the command line: any key of a recipe by its dotted path.

    change = parse("optimizer.lr=1e-3")        # Override(path=('optimizer', 'lr'), value=0.001, …)
    apply({"optimizer": "adamw"}, [change])    # {'optimizer': {'name': 'adamw', 'lr': 0.001}}

Defaults < file < overrides; of two overrides of one key the later one counts. A value is YAML.
"""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shoal.errors import Problem, RecipeError
from shoal.recipe.components import SIGNATURES
from shoal.yaml_source import YamlDocument, loads

_SOURCES = (("data", "train"), ("data", "evaluate"))
_LENGTHS = {"epochs": "steps", "steps": "epochs"}
_DEFAULT_NAMES = {"schedule": "constant"}


@dataclass(frozen=True)
class Override:
    """One `--set`: the path of a key, its value, and the text as it was given."""

    path: tuple[str, ...]
    value: Any
    text: str

    @property
    def place(self) -> str:
        """How a problem names where it came from."""
        return f"--set {self.text}"


def parse(text: str) -> Override:
    """Read `key.key=value`, the value as YAML. Raises RecipeError that quotes ``text``."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(re.fullmatch(r"[^\s.]+", part) for part in path):
        message = "must be KEY=VALUE, as in optimizer.lr=0.05 or checkpoint.every='5 steps'"
        raise RecipeError([Problem("", message, f"--set {text}")])
    try:
        return Override(path, loads(value), text)
    except ValueError:
        message = f"is not YAML: {value!r}; put text with signs of YAML's own in quotes"
        raise RecipeError([Problem(".".join(path), message, f"--set {text}")]) from None


def parse_all(texts: Iterable[str]) -> tuple[Override, ...]:
    """Read several; raises one RecipeError with what is wrong in any of them."""
    read: list[Override] = []
    wrong: list[Problem] = []
    for text in texts:
        try:
            read.append(parse(text))
        except RecipeError as error:
            wrong.extend(error.problems)
    if wrong:
        raise RecipeError(wrong)
    return tuple(read)


def apply(value: Mapping[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """The values of a recipe's file with the overrides on top; ``value`` stays as it is.

    A component or source given as text takes an option all the same; a source given as text keeps
    the transform of the one that it replaces; `steps` takes the place of `epochs`, and the other
    way round. Raises RecipeError for a key inside something that has none.
    """
    result = copy.deepcopy(dict(value))
    wrong: list[Problem] = []
    for override in overrides:
        try:
            _put(result, override)
        except RecipeError as error:
            wrong.extend(error.problems)
    if wrong:
        raise RecipeError(wrong)
    chosen = {override.path[0] for override in overrides if override.value is not None}
    for length in chosen & set(_LENGTHS):
        if _LENGTHS[length] not in chosen:
            result.pop(_LENGTHS[length], None)
    return result


def located(
    problem: Problem, document: YamlDocument | None, overrides: Sequence[Override] = ()
) -> Problem:
    """The same problem with the override, or else the file and line, that it came from."""
    path = tuple(problem.path.split(".")) if problem.path else ()
    for override in reversed(overrides):
        shared = min(len(path), len(override.path))
        if shared and path[:shared] == override.path[:shared]:
            return replace(problem, file=override.place, line=None)
    if document is None:
        return problem
    keys = tuple(int(part) if part.isdigit() else part for part in path)
    return replace(problem, file=document.file, line=document.nearest_line(keys))


def _put(result: dict[str, Any], override: Override) -> None:
    inside = result
    for depth, part in enumerate(override.path[:-1], start=1):
        here = override.path[:depth]
        inside[part] = _as_mapping(inside.get(part), here, override)
        inside = inside[part]
    last = override.path[-1]
    if override.path in _SOURCES:
        inside[last] = _replace_source(inside.get(last), override.value)
    else:
        inside[last] = copy.deepcopy(override.value)


def _as_mapping(current: Any, path: tuple[str, ...], override: Override) -> dict[str, Any]:
    """What is at ``path``, in the form that can take a key."""
    if isinstance(current, dict):
        return current
    if len(path) == 1 and path[0] in SIGNATURES:
        current = _DEFAULT_NAMES.get(path[0]) if current is None else current
        if current is None or isinstance(current, str):
            return {} if current is None else {"name": current}
    if path in _SOURCES and isinstance(current, str):
        return {"source": current}
    if current is None:
        return {}
    message = f"is {current!r}, which has no key {override.path[len(path)]!r}"
    raise RecipeError([Problem(".".join(path), message, override.place)])


def _replace_source(current: Any, value: Any) -> Any:
    """Other data, prepared in the same way: `photos` is still resized as the recipe says."""
    if isinstance(current, dict) and isinstance(value, str) and value != "auto":
        kept = {key: each for key, each in current.items() if key == "transform"}
        return {"source": value, **kept}
    return copy.deepcopy(value)
