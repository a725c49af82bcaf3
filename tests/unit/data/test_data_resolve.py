"""From the recipe's words to definite splits; labels against the model's classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal import data
from shoal.errors import DataMissing
from shoal.recipe import DataSpec

Write = Callable[..., Path]


def resolved(train: Any, evaluate: Any = "auto") -> tuple[Any, Any]:
    return data.resolve(DataSpec.model_validate({"train": train, "evaluate": evaluate}))


def splits(train: Any, evaluate: Any = "auto") -> tuple[Any, Any]:
    first, second = resolved(train, evaluate)
    return first.split, second.split if second else None


def test_known_sets_have_their_own_splits() -> None:
    assert splits("digits") == ("train", "test")
    assert splits("digits:train") == ("train", "test")
    assert splits("digits", None) == ("train", None)
    assert splits("digits:test") == ("test", None)
    assert splits({"source": "digits", "split": "train"}, "digits:test") == ("train", "test")
    assert splits("digits", "digits") == ("train", "test")


def test_an_undivided_folder_is_parted_only_for_evaluation(write_folder: Write) -> None:
    root = str(write_folder("photos", {"cat": 10, "dog": 10}))
    assert splits(root) == ("train", "test")
    assert splits(root, root) == ("train", "test")
    assert splits(root, None) == ("all", None)
    assert splits({"source": root, "split": "train"}, None) == ("train", None)
    assert splits({"source": root, "split": "all"}) == ("all", None)
    assert splits(root, {"source": root, "split": "test"}) == ("train", "test")
    assert splits(root, {"source": root, "split": "all"}) == ("all", "all")
    assert splits({"source": root, "split": "all"}, root) == ("all", "all")
    train, test = resolved(root)
    assert (data.describe(train).examples, data.describe(test).examples) == (18, 2)


def test_one_example_cannot_be_parted(write_folder: Write) -> None:
    root = str(write_folder("photos", {"cat": 1}))
    assert splits(root) == ("all", None)
    assert splits({"source": root, "split": "train"}) == ("train", None)


def test_idx_files_with_and_without_a_test_part(write_idx: Write) -> None:
    assert splits(str(write_idx("a"))) == ("train", "test")
    undivided = str(write_idx("b", test=0))
    assert splits(undivided) == ("train", "test")
    assert splits(undivided, None) == ("all", None)


def test_another_folder_is_evaluated_whole_or_by_its_held_out_part(write_folder: Write) -> None:
    classes = {"cat": 2, "dog": 2}
    train, other = str(write_folder("a", classes)), str(write_folder("b", classes))
    write_folder("c/train", classes)
    parted = str(write_folder("c/val", classes).parent)
    assert splits(train, other) == ("all", "all")
    assert splits(train, parted) == ("all", "val")


def test_evaluation_is_never_augmented_and_has_training_s_size(write_folder: Write) -> None:
    transform = {"augment": "crop_flip", "image_size": 16}
    train, evaluate = resolved({"source": "digits", "transform": transform})
    assert train.transform.augment == "crop_flip"
    assert (evaluate.transform.augment, evaluate.transform.image_size) == ("none", 16)
    assert data.evaluation_spec(train) == evaluate
    classes = {"cat": 2, "dog": 2}
    small = str(write_folder("a", classes))
    large = str(write_folder("b", classes, size=(30, 30)))
    assert resolved(small, large)[1].transform.image_size == 12


def test_sets_that_do_not_belong_together_are_refused(write_folder: Write) -> None:
    first = str(write_folder("a", {"cat": 2, "dog": 2}))
    second = str(write_folder("b", {"cat": 2, "eel": 2}))
    with pytest.raises(DataMissing, match="lacks `dog`, has `eel` besides"):
        resolved(first, second)
    with pytest.raises(DataMissing, match=r"have 1 channel\(s\)"):
        resolved(first, "digits:test")


def test_the_image_size_of_the_transform_is_described() -> None:
    train, _ = resolved({"source": "digits", "transform": {"image_size": 224}})
    about = data.describe(train)
    assert about.image_size == 224
    assert about.input_shape == (1, 224, 224)


def test_labels_outside_the_model_s_classes_are_named(write_idx: Write) -> None:
    train, _ = resolved(str(write_idx()))
    about = data.describe(train)
    data.check_labels(about, None)
    data.check_labels(about, 10)
    data.check_labels(about, 1000)
    with pytest.raises(DataMissing, match=r"label 9.* of example 9 is outside 0\.\.4") as caught:
        data.check_labels(about, 5)
    assert "set model.classes to 10 or leave it out" in str(caught.value)
    with (
        data.open_feed(train, batch_size=4, seed=0, shuffle=True) as feed,
        pytest.raises(DataMissing),
    ):
        data.check_labels(feed, 5)


def test_labels_that_were_too_many_to_describe_are_checked_once_opened(
    write_idx: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.data.sources.idx._LABELS_READ_BYTES", 10)
    train, _ = resolved(str(write_idx()))
    data.check_labels(data.describe(train), 5)
    feed = data.open_feed(train, batch_size=4, seed=0, shuffle=True)
    with pytest.raises(DataMissing, match="label 9 of example 9 is outside"):
        data.check_labels(feed, 5)


def test_names_of_the_room_are_exported() -> None:
    for name in data.__all__:
        assert getattr(data, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = data.nothing
