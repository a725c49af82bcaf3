"""What is predicted on: any source of a recipe, or a folder of images that nobody has sorted.

"digits:test"          a split of a known set            labels known
"photos"               class folders: labels by the names of the classes that were trained on
"holiday"              images and no class folders: no labels

about = Asked.of("photos", train)
feed = about.open(train)                     # in order, each example once
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from shoal import data
from shoal.data import Description, Feed
from shoal.data.decode import SUFFIXES
from shoal.data.feed import Reading
from shoal.data.readers import FileReader
from shoal.data.sources import ALL, Files, ImageFolder
from shoal.data.sources.base import fingerprint
from shoal.data.transforms import Pipeline
from shoal.errors import DataMissing, UsageError
from shoal.recipe import Recipe, SourceSpec


@dataclass(frozen=True)
class Spec:
    """A source and a split of it; ``loose``: a folder of images without classes."""

    source: str
    split: str | None = None
    loose: bool = False

    def open(self, recipe: Recipe, batch_size: int | None = None) -> Feed:
        """The examples in order, with the size and scale of what `recipe` trains on.

        ``batch_size``: the recipe's; models that predict together need the same.
        """
        recipe = recipe.model_copy(update={"batch_size": batch_size or recipe.batch_size})
        train, _ = data.resolve(recipe.data)
        trained = data.describe(train)
        size = train.transform.image_size or trained.image_size
        plain = train.transform.model_copy(update={"augment": "none", "image_size": size})
        if trained.in_channels is None:
            plain = train.transform
        if self.loose:
            return _open_loose(Path(self.source), plain, recipe, trained)
        spec = SourceSpec(source=self.source, split=self.split, transform=plain)
        about = data.describe(spec)
        if (about.kind, about.in_channels) != (trained.kind, trained.in_channels):
            raise DataMissing(
                f"{about.name} holds {about.kind} of {about.in_channels} channel(s), and the model "
                f"was trained on {trained.kind} of {trained.in_channels}",
                hint="Give data of the kind that it was trained on.",
            )
        return data.open_feed(
            spec,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            shuffle=False,
            on_bad_example=recipe.data.on_bad_example,
        )

    def files(self) -> tuple[str, ...] | None:
        """The file of each example, where each has one."""
        if self.loose:
            return _loose_names(Path(self.source))
        source = data.locate(self.source)
        if not isinstance(source, ImageFolder):
            return None
        return source.load(self.split).names


def asked_for(source: str | SourceSpec) -> Spec:
    """What `--data` names; without a split, everything. Raises `UsageError` or `DataMissing`."""
    if isinstance(source, str) and _is_loose(Path(source).expanduser()):
        return Spec(str(Path(source).expanduser()), loose=True)
    try:
        spec = SourceSpec.model_validate(source)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"--data {source}: {said}") from error
    return Spec(spec.source, data.locate(spec.source).check_split(spec.split or ALL))


def evaluation_of(recipe: Recipe) -> Spec:
    """What the recipe evaluates on. Raises `UsageError` where that is nothing."""
    _, held_out = data.resolve(recipe.data)
    if held_out is None:
        raise UsageError(
            f"the recipe {recipe.name} evaluates on nothing, so there is nothing to predict",
            hint="Give data, as in --data digits:test.",
        )
    return Spec(held_out.source, held_out.split)


def labels_by(
    trained: tuple[str, ...] | None, given: tuple[str, ...] | None
) -> tuple[NDArray[np.int64] | None, str | None]:
    """(the trained label of each given one, −1 where they mean nothing, or None for the same; why
    they are left out)."""
    if given is None:
        return None, None
    if trained is None or trained == given:
        return np.arange(len(given)), None
    strangers = [name for name in given if name not in trained]
    if strangers:
        return np.full(len(given), -1), (
            f"labels are left out: the model knows no class `{strangers[0]}` "
            f"(it knows {', '.join(trained[:5])}{', …' if len(trained) > 5 else ''})"
        )
    return np.array([trained.index(name) for name in given], dtype=np.int64), None


def _is_loose(path: Path) -> bool:
    """Whether it is a folder with images and no folders."""
    if not path.is_dir():
        return False
    entries = [each for each in path.iterdir() if not each.name.startswith(".")]
    return not any(each.is_dir() for each in entries) and bool(_loose_names(path))


def _loose_names(path: Path) -> tuple[str, ...]:
    names = (each.name for each in path.iterdir() if not each.name.startswith("."))
    return tuple(sorted(name for name in names if name.lower().endswith(tuple(SUFFIXES))))


def _open_loose(path: Path, transform: Any, recipe: Recipe, trained: Description) -> Feed:
    names = _loose_names(path)
    files = Files(
        root=path,
        names=names,
        labels=np.full(len(names), -1, dtype=np.int64),
        image_size=transform.image_size,
        scale=_scale(recipe),
    )
    size = transform.image_size
    if trained.in_channels != 3:
        raise DataMissing(
            f"{path} holds images of three channels, and the model was trained on "
            f"{trained.kind} of {trained.in_channels}",
        )
    parts = [f"{(path / name).stat().st_size} {name}" for name in names]
    about = replace(
        trained,
        name=str(path),
        format="image folder",
        split=ALL,
        examples=len(names),
        classes=None,
        image_size=size,
        input_shape=(3, size, size),
        fingerprint=fingerprint("loose images", *parts),
        highest_label=None,
    )
    reading = Reading(recipe.batch_size, recipe.seed, False, recipe.data.on_bad_example)
    pipeline = Pipeline(
        scale=files.scale, image_size=None, normalize=transform.normalize, augment="none", seed=0
    )
    return Feed(about, FileReader(files, size), pipeline, reading)


def _scale(recipe: Recipe) -> Any:
    """That of the training data: what is no folder of images has one of its own."""
    train, _ = data.resolve(recipe.data)
    return data.locate(train.source).load(train.split).scale  # type: ignore[union-attr]
