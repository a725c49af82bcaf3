"""Folders of images: classes, splits, sizes, and what is said of folders that are none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoal.data.decode import decode
from shoal.data.sources import locate
from shoal.errors import DataMissing

WriteFolder = Callable[..., Path]


def test_classes_and_numbering_are_sorted(write_folder: WriteFolder) -> None:
    root = write_folder("photos", {"dog": 3, "cat": 2, "Ant": 1})
    files = locate(str(root)).load("all")
    assert locate(str(root)).describe("all").classes == ("Ant", "cat", "dog")
    assert files.labels.tolist() == [0, 1, 1, 2, 2, 2]
    assert files.names[:3] == ("Ant/000.png", "cat/000.png", "cat/001.png")
    assert locate(str(root)).describe("all").highest_label == (2, 3)


def test_suffixes_in_any_case_and_hidden_files(write_folder: WriteFolder) -> None:
    root = write_folder("photos", {"a": 1})
    for name in ("x.JPG", "y.Jpeg", "z.webp", "w.bmp", "v.PGM"):
        picture = Image.new("L" if name.endswith("PGM") else "RGB", (12, 12), 99)
        picture.save(root / "a" / name, format={"PGM": "PPM"}.get(name[-3:]))
    for name in (".hidden.png", "notes.txt", "x.gif"):
        (root / "a" / name).write_bytes(b"nothing")
    (root / ".cache").mkdir()
    (root / "README.md").write_text("read me")
    (root / "a" / "more").mkdir()
    Image.new("RGB", (12, 12)).save(root / "a" / "more" / "deep.png")
    names = locate(str(root)).load("all").names
    assert [Path(name).name for name in names] == [
        "000.png",
        "deep.png",
        "v.PGM",
        "w.bmp",
        "x.JPG",
        "y.Jpeg",
        "z.webp",
    ]


@pytest.mark.parametrize("held_out", ["test", "val", "valid", "Validation"])
def test_subfolders_are_splits(write_folder: WriteFolder, held_out: str) -> None:
    write_folder("photos/train", {"cat": 3, "dog": 2})
    root = write_folder(f"photos/{held_out}", {"dog": 2}).parent
    source = locate(str(root))
    assert source.natural_splits == ("train", held_out.lower())
    assert source.evaluation_split == held_out.lower()
    assert source.load(None).labels.tolist() == [0, 0, 0, 1, 1]
    held = source.load(held_out.lower())
    # Labels go by the training classes, also where the held-out part lacks one.
    assert held.labels.tolist() == [1, 1]
    assert held.names[0] == f"{held_out}/dog/000.png"
    assert source.describe("all").examples == 7


def test_a_folder_with_only_train_in_it_is_undivided(write_folder: WriteFolder) -> None:
    root = write_folder("photos/train", {"cat": 8, "dog": 12}).parent
    source = locate(str(root))
    assert source.natural_splits == ()
    assert source.describe(None).examples == 20
    train, test = source.load("train"), source.load("test")
    assert sorted(train.names + test.names) == list(source.load("all").names)
    assert len(test.names) == 2


def test_the_names_are_the_same_from_wherever_the_folder_is_named(
    write_folder: WriteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder("photos/train", {"cat": 2}).parent
    write_folder("photos/test", {"cat": 1})
    expected = locate(str(root)).load("all").names
    assert expected == ("train/cat/000.png", "train/cat/001.png", "test/cat/000.png")
    monkeypatch.chdir(root)
    for name in (".", "./", "../photos/"):
        assert locate(name).load("all").names == expected


def test_a_class_may_be_called_train(write_folder: WriteFolder) -> None:
    root = write_folder("vehicles", {"train": 2, "bus": 2})
    assert locate(str(root)).describe("all").classes == ("bus", "train")


def test_describing_agrees_with_loading_and_fingerprints(write_folder: WriteFolder) -> None:
    first = write_folder("a", {"cat": 30, "dog": 20})
    for split in ("train", "test", "all"):
        about, files = locate(str(first)).describe(split), locate(str(first)).load(split)
        assert about.examples == len(files.names)
        assert about.bytes == sum((first / name).stat().st_size for name in files.names)
        assert about.input_shape == (3, 12, 12)
    same, other = (
        write_folder("b", {"cat": 30, "dog": 20}),
        write_folder("c", {"cat": 30, "eel": 20}),
    )
    prints = [locate(str(root)).describe("all").fingerprint for root in (first, same, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("size", "expected"), [((12, 12), 12), ((224, 224), 224), ((300, 300), 224), ((12, 10), 224)]
)
def test_the_size_is_that_of_small_squares_or_224(
    write_folder: WriteFolder, size: tuple[int, int], expected: int
) -> None:
    assert (
        locate(str(write_folder("p", {"a": 2}, size=size))).describe("all").image_size == expected
    )


def test_squares_of_several_sizes_become_224(write_folder: WriteFolder) -> None:
    root = write_folder("p", {"a": 2})
    Image.new("RGB", (14, 14)).save(root / "a" / "z.png")
    assert locate(str(root)).describe("all").image_size == 224


def test_an_unreadable_image_does_not_hide_the_size(write_folder: WriteFolder) -> None:
    root = write_folder("p", {"a": 5})
    (root / "a" / "000.png").write_bytes(b"nothing")
    assert locate(str(root)).describe("all").image_size == 12


def test_folders_that_are_something_else(write_folder: WriteFolder, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataMissing, match=f"{empty} holds no class folders"):
        locate(str(empty)).describe(None)
    write_folder("flat", {".": 3})
    with pytest.raises(DataMissing, match="holds 3 images and no class folders") as caught:
        locate(str(tmp_path / "flat")).describe(None)
    assert "one subfolder a class" in str(caught.value)
    root = write_folder("photos", {"cat": 2, "dog": 1})
    for name in ("eel", "fox"):
        (root / name).mkdir()
    (root / "eel" / "eel.txt").write_text("an eel")
    with pytest.raises(DataMissing, match="without images: `eel`, `fox`"):
        locate(str(root)).describe(None)


def test_a_held_out_class_that_training_lacks_is_named(write_folder: WriteFolder) -> None:
    write_folder("photos/train", {"cat": 2})
    root = write_folder("photos/test", {"cat": 1, "dog": 1}).parent
    with pytest.raises(DataMissing, match=r"test has class folders that .*train has not: `dog`"):
        locate(str(root)).describe("test")


def test_names_and_files_that_are_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match="did you mean `digits`"):
        locate("digit")
    with pytest.raises(DataMissing, match="neither a known data set nor a folder"):
        locate(str(tmp_path / "absent"))
    file = tmp_path / "table.csv"
    file.write_text("a,b")
    with pytest.raises(DataMissing, match="is a file"):
        locate(str(file))


def test_an_image_of_the_asked_size_is_not_touched(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png", 20) == pixels.transpose(2, 0, 1)).all()


def test_the_centre_square_is_cut(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (decode(tmp_path / "a.png", 10) == 200).all()


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (Image.new("L", (8, 8), 100), (100, 100, 100)),
        (Image.new("1", (8, 8), 1), (255, 255, 255)),
        (Image.new("RGBA", (8, 8), (10, 20, 30, 0)), (255, 255, 255)),
        (Image.new("LA", (8, 8), (10, 255)), (10, 10, 10)),
        (Image.new("RGB", (8, 8), (10, 20, 30)).convert("P"), None),
        (Image.fromarray(np.full((8, 8), 0x8040, np.uint16)), (0x80, 0x80, 0x80)),
    ],
)
def test_every_mode_becomes_rgb(
    picture: Image.Image, expected: tuple[int, int, int] | None, tmp_path: Path
) -> None:
    picture.save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", 8)
    assert pixels.shape == (3, 8, 8)
    if expected is not None:
        assert (pixels == np.array(expected).reshape(3, 1, 1)).all()


def test_a_large_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    pixels = np.stack(
        [np.tile(ramp, (512, 1)), np.tile(ramp[:, None], (1, 512)), np.full((512, 512), 60)]
    )
    Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    expected = pixels.reshape(3, 32, 16, 32, 16).mean(axis=(2, 4))
    assert np.abs(decode(tmp_path / "a.jpg", 32) - expected).max() < 6
