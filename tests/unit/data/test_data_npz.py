"""NumPy archives: images, tokens and features, read as they lie; named when damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal import data
from shoal.data.sources import Arrays, Images, locate
from shoal.errors import DataMissing
from shoal.recipe import DataSpec, SourceSpec

RANDOM = np.random.default_rng(5)
IMAGES = RANDOM.integers(0, 256, (40, 6, 6), dtype=np.uint8)
COLOURED = RANDOM.integers(0, 256, (40, 3, 4, 6), dtype=np.uint8)
TOKENS = RANDOM.integers(0, 900, (40, 8), dtype=np.uint16)
FEATURES = RANDOM.standard_normal((40, 5))
TARGETS = np.arange(40) % 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "set.npz"


def open_feed(path: Path, split: str | None = "all", **transform: Any) -> data.Feed:
    spec = SourceSpec.model_validate({"source": str(path), "split": split, "transform": transform})
    return data.open_feed(spec, batch_size=16, seed=0, shuffle=True)


@pytest.mark.parametrize("compressed", [True, False])
def test_tokens_are_given_as_they_are(path: Path, compressed: bool) -> None:
    (np.savez_compressed if compressed else np.savez)(path, inputs=TOKENS, targets=TARGETS)
    batch = open_feed(path).read(1, 3, 12)
    assert batch.inputs.dtype is torch.int64
    assert (batch.inputs.numpy() == TOKENS[batch.ids.numpy()]).all()
    assert (batch.targets.numpy() == TARGETS[batch.ids.numpy()]).all()
    assert batch.to(dtype=torch.float64, channels_last=True).inputs.dtype is torch.int64


def test_features_become_float32(path: Path) -> None:
    np.savez(path, inputs=FEATURES, targets=TARGETS)
    batch = open_feed(path).read(0, 0, 16)
    assert batch.inputs.dtype is torch.float32
    assert (batch.inputs.numpy() == FEATURES[batch.ids.numpy()].astype(np.float32)).all()


@pytest.mark.parametrize(("inputs", "shape"), [(IMAGES, (1, 6, 6)), (COLOURED, (3, 4, 6))])
def test_images_are_scaled_like_others(
    path: Path, inputs: np.ndarray, shape: tuple[int, ...]
) -> None:
    np.savez(path, inputs=inputs, targets=TARGETS)
    batch = open_feed(path).read(2, 0, 8)
    assert batch.inputs.shape == (8, *shape)
    expected = inputs[batch.ids.numpy()].reshape(8, *shape) / 127.5 - 1
    assert batch.inputs.numpy() == pytest.approx(expected, abs=1e-6)
    assert open_feed(path, image_size=3).read(0, 0, 2).inputs.shape == (2, shape[0], 3, 3)


def test_any_cut_of_a_step_reads_the_same(path: Path) -> None:
    np.savez(path, inputs=TOKENS, targets=TARGETS)
    feed = open_feed(path)
    parts = [feed.read(0, *cut) for cut in ((0, 5), (5, 5), (5, 16))]
    assert torch.cat([part.inputs for part in parts]).equal(feed.read(0, 0, 16).inputs)


@pytest.mark.parametrize("split", ["train", "test", "all"])
@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("inputs", [IMAGES, TOKENS, FEATURES])
def test_describing_agrees_with_loading(
    path: Path, inputs: np.ndarray, divided: bool, split: str
) -> None:
    held = {"evaluate_inputs": inputs[:7], "evaluate_targets": TARGETS[:7]} if divided else {}
    np.savez(path, inputs=inputs, targets=TARGETS, **held)
    source = locate(str(path))
    about, loaded = source.describe(split), source.load(split)
    sizes = {"all": 47, "train": 40, "test": 7} if divided else {"all": 40, "train": 36, "test": 4}
    assert about.examples == len(loaded.labels) == sizes[split]
    assert about.classes == ("0", "1", "2", "3")
    assert about.highest_label == (loaded.labels.max(), loaded.labels.argmax())
    read = loaded.pixels if isinstance(loaded, Images) else loaded.inputs
    assert about.input_shape == read.shape[1:]
    assert (about.kind == "images") == (about.in_channels is not None) == (inputs is IMAGES)
    assert about.image_size == (6 if inputs is IMAGES else None)


def test_the_files_own_split_is_evaluated_on(path: Path) -> None:
    np.savez(path, inputs=TOKENS, targets=TARGETS, evaluate_inputs=TOKENS, evaluate_targets=TARGETS)
    train, held = data.resolve(DataSpec.model_validate({"train": str(path)}))
    assert held is not None
    assert (train.split, held.split) == ("train", "test")


def test_the_fingerprint_is_of_the_numbers(tmp_path: Path) -> None:
    def fingerprint(name: str, last: int, *, compressed: bool = False) -> str:
        path, tokens = tmp_path / name, TOKENS.copy()
        tokens[-1, -1] = last
        (np.savez_compressed if compressed else np.savez)(path, inputs=tokens, targets=TARGETS)
        return locate(str(path)).describe("all").fingerprint

    first = fingerprint("a.npz", 1)
    assert first == fingerprint("b.npz", 1) == fingerprint("c.npz", 1, compressed=True)
    assert first != fingerprint("d.npz", 2)
    assert first != locate(str(tmp_path / "a.npz")).describe("train").fingerprint


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"inputs": TOKENS}, "lacks `targets`; it has `inputs`"),
        ({"x": TOKENS, "y": TARGETS}, "lacks `inputs`; it has `x`, `y`"),
        ({}, "it has no arrays"),
        ({"inputs": TOKENS, "targets": TARGETS[:39]}, r"`targets` is int64 \[39\]"),
        ({"inputs": TOKENS, "targets": TARGETS / 2}, r"`targets` is float64 \[40\]"),
        ({"inputs": TOKENS[:0], "targets": TARGETS[:0]}, "no examples"),
        ({"inputs": TOKENS[:, 0], "targets": TARGETS}, r"`inputs` is uint16 \[40\]"),
        ({"inputs": np.array([{}] * 40), "targets": TARGETS}, "`inputs` is object"),
        (
            {"inputs": TOKENS, "targets": TARGETS, "evaluate_inputs": TOKENS},
            "lacks `evaluate_targets`",
        ),
        (
            {
                "inputs": TOKENS,
                "targets": TARGETS,
                "evaluate_inputs": TOKENS[:, 1:],
                "evaluate_targets": TARGETS,
            },
            r"`evaluate_inputs` is uint16 \[40, 7\], `inputs` uint16 \[40, 8\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(path, **arrays)
    with pytest.raises(DataMissing, match=message):
        locate(str(path)).describe("all")


def test_damage_is_named(path: Path) -> None:
    np.savez(path, inputs=np.tile(TOKENS, 50), targets=TARGETS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataMissing, match="cannot be read: File is not a zip file"):
        locate(str(path))
    flipped = bytearray(whole)
    flipped[20_000] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(DataMissing, match="damaged: `inputs` cannot be read: Bad CRC-32"):
        locate(str(path)).load("all")


def test_another_file_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no")
    with pytest.raises(DataMissing, match=r"is a file, and no NumPy archive"):
        locate(str(tmp_path / "notes.txt"))


def test_transforms_of_images_are_refused_for_tokens(path: Path) -> None:
    np.savez(path, inputs=TOKENS, targets=TARGETS)
    with pytest.raises(DataMissing, match="holds tokens, and the recipe asks for images of 8"):
        open_feed(path, image_size=8)
    with pytest.raises(DataMissing, match=r"holds tokens, .* augment: flip"):
        open_feed(path, augment="flip")


def test_both_sets_must_hold_the_same_kind(tmp_path: Path) -> None:
    first, second = tmp_path / "a.npz", tmp_path / "b.npz"
    np.savez(first, inputs=TOKENS, targets=TARGETS)
    np.savez(second, inputs=FEATURES, targets=TARGETS)
    with pytest.raises(DataMissing, match=r"features 5, .*a.npz, which is trained on, tokens 8"):
        data.resolve(DataSpec.model_validate({"train": str(first), "evaluate": str(second)}))


def test_arrays_are_held_in_the_models_type(path: Path) -> None:
    """So that reading a batch is one indexing."""
    np.savez(path, inputs=TOKENS, targets=TARGETS.astype(np.uint8))
    loaded = locate(str(path)).load("all")
    assert isinstance(loaded, Arrays)
    assert (loaded.inputs.dtype, loaded.labels.dtype) == (np.int64, np.int64)
