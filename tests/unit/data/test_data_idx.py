"""IDX files: read, split, described without being decoded, and named when they are damaged."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.data.sources import locate
from shoal.data.sources.idx import KNOWN_SETS, Idx, known_set
from shoal.errors import DataMissing

WriteIdx = Callable[..., Path]


def expected_images(count: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (count, 6, 6)).astype(np.uint8)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("separator", ["-", "."])
def test_what_was_written_is_read(write_idx: WriteIdx, zipped: bool, separator: str) -> None:
    source = locate(str(write_idx(zipped=zipped, separator=separator)))
    images = source.load("train")
    assert (images.pixels[:, 0] == expected_images(50)).all()
    assert images.labels.tolist() == [index % 10 for index in range(50)]
    assert len(source.load("test").labels) == 20
    assert len(source.load("all").labels) == 70


@pytest.mark.parametrize("split", ["train", "test", "all", None])
@pytest.mark.parametrize("test", [0, 20])
def test_describing_agrees_with_loading(write_idx: WriteIdx, split: str, test: int) -> None:
    source = locate(str(write_idx(test=test)))
    about, images = source.describe(split), source.load(split)
    assert about.examples == len(images.labels)
    assert about.input_shape == images.pixels.shape[1:]
    assert about.classes == tuple("0123456789")
    assert about.highest_label == (images.labels.max(), images.labels.argmax())


def test_without_t10k_files_a_tenth_is_held_out(write_idx: WriteIdx) -> None:
    source = locate(str(write_idx(test=0)))
    assert source.default_split == "all"
    train, test = source.load("train"), source.load("test")
    assert (len(train.labels), len(test.labels)) == (45, 5)
    rows = np.concatenate([train.pixels, test.pixels]).reshape(50, -1).tolist()
    assert sorted(rows) == sorted(expected_images(50).reshape(50, -1).tolist())


def test_the_fingerprint_is_of_the_files_not_of_where_they_lie(write_idx: WriteIdx) -> None:
    first, second, third = write_idx("a"), write_idx("b"), write_idx("c", train=51)
    prints = [
        locate(str(folder)).describe("train").fingerprint for folder in (first, second, third)
    ]
    assert prints[0] == prints[1] != prints[2]


def test_other_images_of_the_same_sizes_have_another_fingerprint(write_idx: WriteIdx) -> None:
    folder = write_idx(zipped=False)
    before = locate(str(folder)).describe("train").fingerprint
    path = train_images(folder)
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    assert locate(str(folder)).describe("train").fingerprint != before


def test_large_label_files_are_not_read_to_describe(
    write_idx: WriteIdx, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.data.sources.idx._LABELS_READ_BYTES", 10)
    about = locate(str(write_idx())).describe("train")
    assert about.examples == 50
    assert about.classes is about.highest_label is about.num_classes is None


def train_images(folder: Path) -> Path:
    return next(folder.glob("train-images*"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_file_is_named_before_anything_is_decoded(
    write_idx: WriteIdx, zipped: bool
) -> None:
    folder = write_idx(zipped=zipped)
    path = train_images(folder)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataMissing) as caught:
        locate(str(folder)).describe("train")
    text = str(caught.value)
    assert str(path) in text
    assert "needed: 1,816 bytes, as its header says (50 × 6 × 6)" in text
    assert ("damaged" if zipped else "holds 1,796 bytes") in text


def test_a_zipped_file_of_the_wrong_length_is_named(write_idx: WriteIdx) -> None:
    folder = write_idx()
    path = train_images(folder)
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + b"more"))
    with pytest.raises(DataMissing, match="holds 1,820 bytes"):
        locate(str(folder)).describe("train")


def test_a_flipped_byte_in_a_zipped_file_is_found_when_it_is_read(write_idx: WriteIdx) -> None:
    folder = write_idx()
    path = train_images(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataMissing, match="damaged") as caught:
        locate(str(folder)).load("train")
    assert str(path) in str(caught.value)


def test_a_zipped_file_of_several_members_is_read(write_idx: WriteIdx) -> None:
    folder = write_idx()
    path = train_images(folder)
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data[:100]) + gzip.compress(data[100:]))
    assert locate(str(folder)).describe("train").examples == 50
    assert (locate(str(folder)).load("train").pixels[:, 0] == expected_images(50)).all()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"<html>not found</html>", "begins with 3c 68 74 6d"),
        (b"", "begins with $"),
        (b"\x00\x00\x08\x03\x00", "begins with 00 00 08 03"),
        (b"\x00\x00\x0d\x03" + bytes(12), "begins with 00 00 0d 03"),
        (b"\x1f\x8b\x08oh no", "cannot be read"),
    ],
)
def test_a_file_that_is_something_else_is_named(
    write_idx: WriteIdx, content: bytes, found: str
) -> None:
    folder = write_idx()
    path = train_images(folder)
    path.write_bytes(content)
    with pytest.raises(DataMissing) as caught:
        locate(str(folder)).describe("train")
    assert str(path) in caught.value.message
    assert found.rstrip("$") in caught.value.message
    assert "IDX file of unsigned bytes with 3 dimension(s)" in str(caught.value)


def test_missing_labels_and_a_count_that_differs_are_named(write_idx: WriteIdx) -> None:
    folder = write_idx()
    labels = folder / "train-labels-idx1-ubyte.gz"
    labels.write_bytes((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(DataMissing, match=r"holds 50 images, .* 20 labels"):
        locate(str(folder)).describe("train")
    labels.unlink()
    with pytest.raises(DataMissing, match=r"lacks train-labels-idx1-ubyte \(or .gz\)"):
        locate(str(folder)).describe("train")


def test_no_images_at_all(write_idx: WriteIdx) -> None:
    folder = write_idx(zipped=False)
    train_images(folder).write_bytes(b"\x00\x00\x08\x03" + bytes(4) + b"\x00\x00\x00\x06" * 2)
    (folder / "train-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + bytes(4))
    with pytest.raises(DataMissing, match="holds no images: its header says 0 × 6 × 6"):
        locate(str(folder)).describe("train")


def test_a_known_set_is_found_in_the_data_home(write_idx: WriteIdx, tmp_path: Path) -> None:
    write_idx("mnist")
    source = known_set("mnist", tmp_path)
    assert source.describe("train").examples == 50
    assert source.load("train").scale == KNOWN_SETS["mnist"].scale


def test_a_known_set_that_is_absent_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataMissing, match="mnist is not on this machine") as caught:
        known_set("mnist", tmp_path)
    assert str(tmp_path / "mnist") in str(caught.value)
    assert "--set data.train=FOLDER" in str(caught.value)
    with pytest.raises(DataMissing, match="no data home is set"):
        known_set("mnist", None)
    known = KNOWN_SETS["fashion-mnist"]
    nowhere = type(known)(known.classes, known.scale, (str(tmp_path / "no"),), known.get)
    monkeypatch.setitem(KNOWN_SETS, "fashion-mnist", nowhere)
    with pytest.raises(DataMissing, match="apt-get install dataset-fashion-mnist"):
        known_set("fashion-mnist", None)


def test_fashion_mnist_itself() -> None:
    try:
        source = known_set("fashion-mnist", None)
    except DataMissing as missing:
        pytest.skip(f"needs Debian's package dataset-fashion-mnist: {missing}")
    assert isinstance(source, Idx)
    about, images = source.describe("train"), source.load("train")
    assert about.examples == 60_000
    assert source.describe("test").examples == 10_000
    assert np.bincount(images.labels).tolist() == [6000] * 10
    pixels = images.pixels[::10] / 255
    assert abs(pixels.mean() - images.scale.mean[0]) < 5e-3
    assert abs(pixels.std() - images.scale.std[0]) < 5e-3
