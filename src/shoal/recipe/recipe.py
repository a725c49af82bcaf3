"""The recipe: what is trained, and nothing about where or how it is split.

    recipe = Recipe.from_yaml("recipes/digits.yaml")
    recipe.optimizer.options["lr"]       # 0.1
    recipe.fingerprint                   # '9f0c…': the same for every strategy
    recipe.with_changes("seed=1").differences(recipe)      # ['seed: 1 here, 0 there']

All mistakes are reported at once, in one RecipeError.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    create_model,
    field_validator,
)
from pydantic_core.core_schema import ValidationInfo

from shoal.errors import Problem, RecipeError
from shoal.recipe.component import Component, fail, name_of, reader, signature_of
from shoal.recipe.components import METRICS, SIGNATURES, as_tuple
from shoal.recipe.data import DataSpec
from shoal.recipe.overrides import Override, apply, located, parse_all
from shoal.units import Duration
from shoal.yaml_source import YamlDocument, dump, load, nearest, problems

_NOT_IN_FINGERPRINT = ("checkpoint", "evaluate.every")
_OPTIONAL = ("epochs", "steps", "stop", "members")
_OF_A_MEMBER = ("model", "objective", "optimizer", "schedule")


def _read_duration(value: Any) -> Duration:
    if isinstance(value, Duration):
        return value
    if not isinstance(value, str):
        raise ValueError(f"must be {Duration.allowed}")
    return Duration.parse(value)


Length = Annotated[Duration, PlainValidator(_read_duration), PlainSerializer(str, return_type=str)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class EvaluateSpec(_Part):
    """How often to evaluate, and what to report beside the loss."""

    every: Length = Duration(1, "epochs")
    metrics: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ("accuracy",)

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for index, name in enumerate(metrics):
            if name not in METRICS:
                fail((index,), f"is not a known metric: {nearest(name, METRICS)}", name)
            if name in metrics[:index]:
                fail((index,), "is in the list twice", name)
        return metrics


class CheckpointSpec(_Part):
    """How often to save, and how many of the last checkpoints to keep (the best one apart)."""

    every: Length = Duration(1, "epochs")
    keep: Annotated[int, Field(ge=1)] = 3


class StopSpec(_Part):
    """End the run when ``metric`` of the evaluation has not improved for ``patience``."""

    metric: str
    patience: Length


def _read_members(value: Any) -> Any:
    """Each member's changes: a text, or a list of them."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("must be a list with the changes of each member, as in [model.width=16]")
    changes = [[each] if isinstance(each, str) else each for each in value]
    if not all(isinstance(each, list | tuple) for each in changes):
        raise ValueError("each member is a text, as in model.width=16, or a list of them")
    return tuple(tuple(each) for each in changes)


class Recipe(_Part):
    """What is trained: model, data, objective, optimizer, schedule, global batch, seed, length.

    Takes what a file has (names or mappings for components, texts for durations and sources), or
    the values themselves. ``members``: what the members of an ensemble that is trained by one run
    have that is not the recipe's, `key=value` texts of the model, objective, optimizer or schedule.
    Frozen, hashable, equal where the values are equal; raises RecipeError
    with every problem. ``batch_size`` is the global batch in examples, whatever the strategy.
    """

    name: Annotated[str, Field(max_length=100)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    batch_size: Annotated[int, Field(ge=1)]
    epochs: Annotated[int, Field(ge=1)] | None = None
    steps: Annotated[Annotated[int, Field(ge=1)] | None, Field(validate_default=True)] = None
    precision: Literal["auto", "float32", "bf16"] = "auto"
    normalize_over: Literal["batch"] | Annotated[int, Field(ge=1)] = "batch"
    model: Annotated[Component, reader("model")]
    data: DataSpec
    objective: Annotated[Component, reader("objective")]
    optimizer: Annotated[Component, reader("optimizer")]
    schedule: Annotated[Component, reader("schedule"), Field(validate_default=True)] = Component(
        name="constant"
    )
    evaluate: EvaluateSpec = EvaluateSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    stop: StopSpec | None = None
    members: Annotated[tuple[tuple[str, ...], ...] | None, BeforeValidator(_read_members)] = None

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeError(_problems(error, values)) from None

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not all(sign.isalnum() or sign in "._-" for sign in name) or not name[:1].isalnum():
            raise ValueError("must be letters, digits, `.`, `_`, `-`: it names the run's folder")
        return name

    @field_validator("steps")
    @classmethod
    def _one_length(cls, steps: int | None, info: ValidationInfo) -> int | None:
        if "epochs" in info.data and (steps is None) == (info.data["epochs"] is None):
            given = "neither" if steps is None else "both"
            raise ValueError(f"exactly one of `epochs` and `steps` is needed, given {given}")
        return steps

    @field_validator("stop")
    @classmethod
    def _stop_can_be_measured(cls, stop: StopSpec | None, info: ValidationInfo) -> StopSpec | None:
        evaluate, data = info.data.get("evaluate"), info.data.get("data")
        if stop is None or evaluate is None:
            return stop
        known = dict.fromkeys(("loss", *evaluate.metrics))
        if stop.metric not in known:
            hint = nearest(stop.metric, list(known))
            fail(("metric",), f"must be loss or one of evaluate.metrics: {hint}", stop.metric)
        if data is not None and data.evaluate is None:
            text = "can't be measured: `data.evaluate` is null, so there is no evaluation"
            fail(("metric",), text, stop.metric)
        return stop

    @field_validator("members")
    @classmethod
    def _change_what_members_may(
        cls, members: tuple[tuple[str, ...], ...] | None
    ) -> tuple[tuple[str, ...], ...] | None:
        for number, changes in enumerate(members or ()):
            for change in parse_all(changes):
                if change.path[0] not in _OF_A_MEMBER:
                    text = f"changes {change.path[0]}; members may differ in {_OF_A_MEMBER}"
                    fail((number,), text, change.text)
        return members

    def member(self, number: int) -> "Recipe":
        """The recipe of one member. Raises RecipeError for a change that it cannot have."""
        plain = self.to_dict()
        changes = (plain.pop("members", None) or ())[number : number + 1]
        return Recipe.from_dict(plain).with_changes(*(changes[0] if changes else ()))

    @classmethod
    def from_yaml(cls, path: Path | str) -> "Recipe":
        """Read a file; its `strategy:` is left to :func:`load_recipe`. Raises RecipeError."""
        return load_recipe(path).recipe

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Recipe":
        """Make a recipe of plain dicts, lists and scalars, as :meth:`to_dict` gives them."""
        return _checked(value, None, ())

    def with_changes(self, *overrides: str) -> "Recipe":
        """This recipe with `key=value` changes, as after `--set`. Raises RecipeError."""
        changes = parse_all(overrides)
        return _checked(apply(self.to_dict(), changes), None, changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars with every default written out."""
        value = self.model_dump(mode="json")
        return {k: v for k, v in value.items() if v is not None or k not in _OPTIONAL}

    def to_yaml(self, path: Path | str) -> None:
        """Write a file that :meth:`from_yaml` reads back equal."""
        Path(path).write_text(dump(self.to_dict()), encoding="utf-8")

    def fingerprint_items(self) -> dict[str, Any]:
        """Dotted key → plain value, for all that decides what is computed.

        Left out are `checkpoint` and `evaluate.every`; a recipe has no strategy and no cluster.
        """
        items = dict(_flat(self.to_dict(), ""))
        out = tuple(f"{key}." for key in _NOT_IN_FINGERPRINT)
        return {key: each for key, each in items.items() if not f"{key}.".startswith(out)}

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of :meth:`fingerprint_items` as canonical JSON, in hexadecimal."""
        text = json.dumps(self.fingerprint_items(), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_128_hexdigest(text.encode())

    def differences(self, other: Self) -> list[str]:
        """One text a key of the fingerprint that differs: `optimizer.lr: 0.1 here, 0.05 there`."""
        mine, theirs = self.fingerprint_items(), other.fingerprint_items()
        return [
            f"{key}: {_shown(mine, key)} here, {_shown(theirs, key)} there"
            for key in dict.fromkeys([*mine, *theirs])
            if _shown(mine, key) != _shown(theirs, key)
        ]


@dataclass(frozen=True)
class RecipeFile:
    """A recipe, the strategy that its file wants by default (`auto` if none), and the file."""

    recipe: Recipe
    strategy_default: str
    path: Path


def load_recipe(path: Path | str, overrides: tuple[str, ...] = ()) -> RecipeFile:
    """Read a recipe's file with `--set key=value` changes on top.

    Raises RecipeError with every problem, each with its key and the file and line, or the `--set`,
    that it came from.
    """
    document = load(path)
    changes = parse_all(overrides)
    if not isinstance(document.value, Mapping):
        text = "must be a mapping of keys to values: name, batch_size, model, data, …"
        raise RecipeError([Problem("", text, document.file)])
    value = apply(document.value, changes)
    strategy = value.pop("strategy", "auto")
    if isinstance(strategy, str):
        return RecipeFile(_checked(value, document, changes), strategy, Path(path))
    text = f"must be text, as in auto, single or dp2; given {strategy!r}"
    found = [located(Problem("strategy", text), document, changes)]
    try:
        _checked(value, document, changes)
    except RecipeError as error:
        found.extend(error.problems)
    raise RecipeError(found)


def _checked(
    value: Mapping[str, Any], document: YamlDocument | None, changes: tuple[Override, ...]
) -> Recipe:
    wrong = [f"{key!r}" for key in value if not isinstance(key, str)]
    if wrong:
        raise RecipeError([Problem(key, "must be text: it is the name of a key") for key in wrong])
    try:
        return Recipe(**value)
    except RecipeError as error:
        found = [located(problem, document, changes) for problem in error.problems]
        raise RecipeError(sorted(found, key=lambda problem: problem.line or 0)) from None


def _problems(error: ValidationError, values: Mapping[str, Any]) -> list[Problem]:
    found = []
    for problem in problems(error, None, _shape(values)):
        if problem.path == "strategy":
            text = "is no part of a recipe: give it to train, plan or verify"
            problem = Problem("strategy", text)
        found.append(problem)
    return found


def _shape(values: Mapping[str, Any]) -> type[BaseModel]:
    """A class with the keys of a recipe with these components, to compare unknown names with."""
    fields: dict[str, Any] = {
        name: (field.annotation, None) for name, field in Recipe.model_fields.items()
    }
    for role in SIGNATURES:
        signature = signature_of(role, name_of(values.get(role)))
        options: Any = dict[str, Any] if signature is None else signature
        fields[role] = (options, None)
    return create_model("Recipe", strategy=(str, "auto"), **fields)


def _flat(value: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    """Nested mappings as dotted keys, depth first."""
    items: list[tuple[str, Any]] = []
    for key, each in value.items():
        if isinstance(each, Mapping) and each:
            items.extend(_flat(each, f"{prefix}{key}."))
        else:
            items.append((f"{prefix}{key}", each))
    return items


def _shown(items: Mapping[str, Any], key: str) -> str:
    return json.dumps(items[key], ensure_ascii=False) if key in items else "nothing"
