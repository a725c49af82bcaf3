"""From what a recipe says of its data to what is read: splits, sizes and classes made definite.

    train, evaluate = resolve(recipe.data)       # every split written out
    about = describe(train)
    check_labels(about, recipe.model.options["classes"])

    recipe's train      the files' splits    train reads       evaluate "auto" reads
    digits              train, test          train             test
    folder              none                 nine tenths       the tenth held out
    folder, train       none                 nine tenths       the tenth held out
    digits:all          any                  everything        nothing: all of it is trained on

Needs no torch, so a planner can ask too.
"""

from dataclasses import replace
from typing import Literal, Protocol

from shoal.data.sources import ALL, TEST, TRAIN, Description, Source, locate
from shoal.errors import DataMissing
from shoal.recipe import DataSpec, SourceSpec


class Described(Protocol):
    """A feed, or anything else that knows what it reads."""

    @property
    def description(self) -> Description: ...


def describe(spec: SourceSpec) -> Description:
    """What a source holds, with the image size that its transform asks for.

    Cheap: names, headers and small label files are read, no image is decoded. Raises DataMissing
    for a source that is not there, is something else, or has no such split.
    """
    return described(locate(spec.source), spec)


def described(source: Source, spec: SourceSpec) -> Description:
    """`describe` for a source that has been located already."""
    about = source.describe(spec.split)
    size = spec.transform.image_size
    if size is None:
        return about
    if about.in_channels is None:
        raise DataMissing(
            f"{about.name} holds {about.kind}, and the recipe asks for images of {size} pixels",
            hint="leave out transform.image_size",
        )
    return replace(about, image_size=size, input_shape=(about.in_channels, size, size))


def resolve(data: DataSpec) -> tuple[SourceSpec, SourceSpec | None]:
    """What is trained on and what is evaluated on, each with its split written out.

    An image size that evaluation leaves open becomes the training data's. Raises DataMissing for
    sources that are not there, and for two that do not belong together (classes, channels).
    """
    source, wanted = locate(data.train.source), data.evaluate
    train = _with_split(data.train, _training_split(source, data.train, wanted))
    if wanted is None:
        return train, None
    evaluate = evaluation_spec(train) if wanted == "auto" else _asked_for(wanted, train)
    return train, None if evaluate is None else _matching(train, evaluate)


def evaluation_spec(train: SourceSpec) -> SourceSpec | None:
    """The held-out split that goes with a training split; None where nothing is held out of it.

    The transform is the training one without augmentation.
    """
    source = locate(train.source)
    chosen = source.check_split(train.split)
    if chosen == ALL or chosen != (source.natural_splits or (TRAIN,))[0]:
        return None
    plain = train.transform.model_copy(update={"augment": "none"})
    held_out = source.evaluation_split or TEST
    if source.describe(held_out).examples == 0:
        return None
    return train.model_copy(update={"split": held_out, "transform": plain})


def check_labels(about: Description | Described, classes: int | None) -> None:
    """Check that a model of so many classes can answer with every label. Raises DataMissing."""
    about = about if isinstance(about, Description) else about.description
    if classes is None or about.highest_label is None:
        return
    label, example = about.highest_label
    if label < classes:
        return
    named = f" (`{about.classes[label]}`)" if about.classes and label < len(about.classes) else ""
    raise DataMissing(
        f"{about.name}:{about.split}: label {label}{named} of example {example} "
        f"is outside 0..{classes - 1}",
        hint=f"set model.classes to {about.num_classes or label + 1} or leave it out",
    )


def _with_split(spec: SourceSpec, split: str) -> SourceSpec:
    return spec.model_copy(update={"split": split})


def _training_split(
    source: Source, spec: SourceSpec, wanted: SourceSpec | Literal["auto"] | None
) -> str:
    """Nine tenths of an undivided set if the other tenth is evaluated on, and nothing was said."""
    if spec.split is not None or source.natural_splits or wanted is None:
        return source.check_split(spec.split)
    parted = wanted == "auto" or (wanted.source == spec.source and wanted.split in (None, TEST))
    return TRAIN if parted and source.describe(ALL).examples > 1 else ALL


def _asked_for(wanted: SourceSpec, train: SourceSpec) -> SourceSpec:
    """The evaluation that a recipe names; without a split, what the set holds out, if it does."""
    source = locate(wanted.source)
    if wanted.split is None and wanted.source == train.source:
        held_out = evaluation_spec(train)
        if held_out is not None:
            return wanted.model_copy(update={"split": held_out.split})
    split = wanted.split or source.evaluation_split or source.default_split
    return _with_split(wanted, source.check_split(split))


def _matching(train: SourceSpec, evaluate: SourceSpec) -> SourceSpec:
    """The evaluation at the training data's size. Raises DataMissing if the sets do not match."""
    trained, evaluated = describe(train), describe(evaluate)
    if trained.kind != evaluated.kind or (
        trained.kind != "images" and trained.input_shape != evaluated.input_shape
    ):
        raise DataMissing(
            f"{evaluated.name} holds {evaluated.kind} {_by(evaluated.input_shape)}, "
            f"{trained.name}, which is trained on, {trained.kind} {_by(trained.input_shape)}",
            hint="evaluate on examples of the same kind: `--set data.evaluate=…`",
        )
    if trained.in_channels != evaluated.in_channels:
        raise DataMissing(
            f"the images of {evaluated.name} have {evaluated.in_channels} channel(s), "
            f"those of {trained.name}, which is trained on, {trained.in_channels}",
            hint="evaluate on images of the same kind: `--set data.evaluate=…`",
        )
    if trained.num_classes and evaluated.num_classes and trained.classes != evaluated.classes:
        raise DataMissing(
            f"{evaluated.name} has other classes than {trained.name}, which is trained on: "
            f"{_difference(trained.classes, evaluated.classes)}",
            hint="a label must mean the same in both: evaluate on a set that has the same class "
            "folders, or put both into one folder as `train` and `test`",
        )
    if evaluate.transform.image_size is None and trained.image_size != evaluated.image_size:
        sized = evaluate.transform.model_copy(update={"image_size": trained.image_size})
        return evaluate.model_copy(update={"transform": sized})
    return evaluate


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _difference(trained: tuple[str, ...] | None, evaluated: tuple[str, ...] | None) -> str:
    first, second = trained or (), evaluated or ()
    lacking = [f"lacks `{name}`" for name in first if name not in second]
    more = [f"has `{name}` besides" for name in second if name not in first]
    return ", ".join([*lacking, *more][:5])
