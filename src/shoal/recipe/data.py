"""What a recipe says about its data: which source, which split, what is done to an image.

"digits:train"                                       # a known set and its split
"photos/cats-and-dogs"                               # a path: anything with a `/` or a `.`
{source: "digits:train", transform: {image_size: 224}}
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WrapSerializer,
    field_validator,
    model_validator,
)
from pydantic_core.core_schema import SerializerFunctionWrapHandler, ValidationInfo

from shoal.recipe.component import fail
from shoal.recipe.components import DATA_SETS
from shoal.yaml_source import nearest


class Transform(BaseModel):
    """What is done to an image: resized to ``image_size``, normalized, in training augmented."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image_size: Annotated[int, Field(ge=1)] | None = None
    normalize: bool = True
    augment: Literal["none", "flip", "crop", "crop_flip"] = "none"


class SourceSpec(BaseModel):
    """A known data set or a path, the split of it (None: all, or its usual one), the transform."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str
    split: str | None = None
    transform: Transform = Transform()

    @property
    def known(self) -> bool:
        """Whether the source is a data set that Shoal knows by name; otherwise it is a path."""
        return self.source in DATA_SETS

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if isinstance(value, str):
            source, split = _parted(value)
            wrong = _wrong_source(source) or _wrong_split(source, split)
            return fail((), wrong, value) if wrong else {"source": source, "split": split}
        if isinstance(value, Mapping) and isinstance(value.get("source"), str):
            source, split = _parted(value["source"])
            return {**value, "source": source, "split": value.get("split", split)}
        if isinstance(value, Mapping | SourceSpec):
            return value
        raise ValueError(
            "must be a known data set (as in 'digits:train'), a path, "
            "or a mapping with `source`, `split` and `transform`"
        )

    @field_validator("source")
    @classmethod
    def _known_or_path(cls, source: str) -> str:
        wrong = _wrong_source(source)
        if wrong:
            raise ValueError(wrong)
        is_path = source in DATA_SETS or "/" in source or "." in source
        # With `./` it stays a path for whoever reads the recipe where this folder is not.
        return source if is_path else f"./{source}"

    @field_validator("split")
    @classmethod
    def _known_split(cls, split: str | None, info: ValidationInfo) -> str | None:
        wrong = _wrong_split(info.data.get("source", ""), split)
        if wrong:
            raise ValueError(wrong)
        return split

    def to_value(self) -> str | dict[str, Any]:
        """What a file says: one text where that says it all."""
        if self.transform == Transform():
            if self.split is None:
                return self.source
            if self.known:
                return f"{self.source}:{self.split}"
        split = {} if self.split is None else {"split": self.split}
        return {"source": self.source, **split, "transform": self.transform.model_dump()}


def _parted(text: str) -> tuple[str, str | None]:
    """`digits:train` as source and split; a path stays whole."""
    name, colon, split = text.partition(":")
    return (name, split) if colon and name in DATA_SETS else (text, None)


def _wrong_source(source: str) -> str | None:
    if source in DATA_SETS or "/" in source or "." in source:
        return None
    # No file system has longer names, and some raise for them.
    if 0 < len(source) < 256 and Path(source).exists():
        return None
    hint = nearest(source.partition(":")[0], list(DATA_SETS))
    return f"is neither a known data set nor a path that exists: {hint}"


def _wrong_split(source: str, split: str | None) -> str | None:
    if source not in DATA_SETS or split is None or split in DATA_SETS[source]:
        return None
    return f"names no split of {source} (known: {', '.join(DATA_SETS[source])})"


def _written(value: Any, _: SerializerFunctionWrapHandler) -> Any:
    return value.to_value() if isinstance(value, SourceSpec) else value


def _auto_or_source(value: Any) -> Any:
    # Told apart by hand: pydantic would report what every other form of the value lacks.
    return value if value is None or value == "auto" else SourceSpec.model_validate(value)


class DataSpec(BaseModel):
    """The data to train on and to evaluate on, and what to do with an example that can't be read.

    ``evaluate`` "auto" is the held-out part of the same source; None is no evaluation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    train: Annotated[SourceSpec, WrapSerializer(_written)]
    evaluate: Annotated[
        SourceSpec | Literal["auto"] | None,
        BeforeValidator(_auto_or_source),
        WrapSerializer(_written),
    ] = "auto"
    on_bad_example: Literal["raise", "skip"] = "raise"
    ledger: bool = False
