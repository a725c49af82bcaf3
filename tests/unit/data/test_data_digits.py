"""The digits that scikit-learn ships."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.data.sources import digits
from shoal.data.sources.digits import Digits
from shoal.errors import DataMissing


def test_the_images_are_those_that_scikit_learn_loads() -> None:
    from sklearn.datasets import load_digits

    theirs, ours = load_digits(), Digits().load("all")
    assert (ours.pixels.reshape(-1, 64) == theirs.data).all()
    assert (ours.labels == theirs.target).all()


def test_train_and_test_part_the_whole_by_class() -> None:
    train, test, whole = (Digits().load(split) for split in ("train", "test", "all"))
    assert (len(train.labels), len(test.labels), len(whole.labels)) == (1437, 360, 1797)
    rows = np.concatenate([train.pixels, test.pixels]).reshape(-1, 64)
    assert sorted(rows.tolist()) == sorted(whole.pixels.reshape(-1, 64).tolist())
    assert set(np.bincount(test.labels)) == {35, 36, 37}


def test_the_scale_is_that_of_the_training_images() -> None:
    train = Digits().load("train")
    pixels = train.pixels / train.scale.highest
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert abs(pixels.mean() - train.scale.mean[0]) < 1e-4
    assert abs(pixels.std() - train.scale.std[0]) < 1e-4


def test_describing_agrees_with_loading() -> None:
    for split in (None, "train", "test", "all"):
        about, loaded = Digits().describe(split), Digits().load(split)
        assert about.examples == len(loaded.labels)
        assert about.input_shape == loaded.pixels.shape[1:] == (1, 8, 8)
        assert about.num_classes == 10
        assert about.highest_label == (9, loaded.labels.tolist().index(9))
    assert Digits().describe(None) == Digits().describe("train")
    assert Digits().describe("train").fingerprint != Digits().describe("test").fingerprint


def test_an_unknown_split_names_those_there_are() -> None:
    with pytest.raises(DataMissing, match="no split 'dev'") as caught:
        Digits().describe("dev")
    assert "train, test, all" in str(caught.value)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataMissing, match="pip install scikit-learn"):
        Digits().describe("train")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"not gzip", "Not a gzipped file"),
        (gzip.compress(b"1,2,3\n4,5,6\n", mtime=0), "2 lines of 3 numbers"),
        (gzip.compress(b"0," * 64 + b"0\n", mtime=0)[:-9], "ended before"),
    ],
)
def test_another_file_is_named(
    content: bytes, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(content)
    monkeypatch.setattr(digits, "_find", lambda: path)
    with pytest.raises(DataMissing, match=found) as caught:
        Digits().load("train")
    assert str(path) in str(caught.value)


def test_one_changed_pixel_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = gzip.decompress(digits._find().read_bytes())
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(gzip.compress(text.replace(b"5", b"6", 1)))
    monkeypatch.setattr(digits, "_find", lambda: path)
    with pytest.raises(DataMissing, match="its numbers are others"):
        Digits().describe("train")


def test_recompressing_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Digits().describe("train").fingerprint
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(gzip.compress(gzip.decompress(digits._find().read_bytes()), 1))
    monkeypatch.setattr(digits, "_find", lambda: path)
    assert Digits().describe("train").fingerprint == expected


def test_describing_imports_neither_scikit_learn_nor_torch() -> None:
    import subprocess

    code = (
        "import sys; from shoal import data; from shoal.recipe import SourceSpec;"
        "data.describe(SourceSpec.model_validate('digits:train'));"
        "print(sorted({'torch', 'sklearn', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
