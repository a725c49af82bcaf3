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
from typing import Protocol

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
    return replace(about, image_size=size, input_shape=(about.in_channels, size, size))


def resolve(data: DataSpec) -> tuple[SourceSpec, SourceSpec | None]:
    """What is trained on and what is evaluated on, each with its split written out.

    An image size that evaluation leaves open becomes the training data's. Raises DataMissing for
    sources that are not there, and for two that do not belong together (classes, channels).
    """
    train = locate(data.train.source)
    if data.evaluate is None:
        return _with_split(data.train, train.check_split(data.train.split)), None
    if data.evaluate == "auto" or _same_and_open(data.train, data.evaluate):
        chosen = _training_split(train, data.train)
        transform = data.train.transform if data.evaluate == "auto" else data.evaluate.transform
        held_out = evaluation_spec(_with_split(data.train, chosen))
        if held_out is None:
            return _with_split(data.train, chosen), None
        held_out = held_out.model_copy(
            update={"transform": transform.model_copy(update={"augment": "none"})}
        )
    else:
        chosen = train.check_split(data.train.split)
        other = locate(data.evaluate.source)
        split = data.evaluate.split or other.evaluation_split or other.default_split
        held_out = _with_split(data.evaluate, other.check_split(split))
    train_spec = _with_split(data.train, chosen)
    return train_spec, _matching(train_spec, held_out)


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


def _same_and_open(train: SourceSpec, evaluate: SourceSpec) -> bool:
    """Whether evaluation names the training source again and leaves it to us to part them."""
    return evaluate.source == train.source and evaluate.split is None


def _training_split(source: Source, spec: SourceSpec) -> str:
    """With something held out: nine tenths of an undivided set, unless all of it is asked for."""
    if spec.split is None and not source.natural_splits:
        return TRAIN if source.describe(ALL).examples > 1 else ALL
    return source.check_split(spec.split)


def _matching(train: SourceSpec, evaluate: SourceSpec) -> SourceSpec:
    trained, evaluated = describe(train), describe(evaluate)
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


def _difference(trained: tuple[str, ...] | None, evaluated: tuple[str, ...] | None) -> str:
    first, second = trained or (), evaluated or ()
    lacking = [f"lacks `{name}`" for name in first if name not in second]
    more = [f"has `{name}` besides" for name in second if name not in first]
    return ", ".join([*lacking, *more][:5])
