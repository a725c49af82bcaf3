"""Resizing, augmentation and normalisation, a row at a time whatever the batch."""

import numpy as np
import pytest
import torch

from shoal.data.sources import Scale
from shoal.data.transforms import Pipeline, augment, crop_padding, resize


def images(count: int, height: int = 16, width: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator).float()


def test_resizing_averages_and_keeps_the_centre() -> None:
    flat = torch.full((2, 1, 8, 8), 7.0)
    assert torch.allclose(resize(flat, 3), torch.full((2, 1, 3, 3), 7.0))
    wide = torch.zeros(1, 1, 8, 24)
    wide[..., 8:16] = 5.0
    assert torch.equal(resize(wide, 8), torch.full((1, 1, 8, 8), 5.0))
    assert resize(images(2, 10, 7), 5).shape == (2, 3, 5, 5)
    assert resize(images(0, 10, 7), 5).shape == (0, 3, 5, 5)
    # Antialiased: shrinking noise averages it.
    assert resize(images(4, 64, 64), 8).std() < 0.35 * images(4, 64, 64).std()


@pytest.mark.parametrize(("side", "expected"), [(8, 1), (28, 4), (32, 4), (224, 28), (2, 1)])
def test_a_crop_moves_an_eighth_of_the_side(side: int, expected: int) -> None:
    assert crop_padding(side, side + 5) == expected


def test_flipping_is_a_fair_coin() -> None:
    batch, ids = images(400), np.arange(400)
    out = augment(batch, ids, kind="flip", seed=0, epoch=0)
    same = (out == batch).flatten(1).all(dim=1)
    mirrored = (out == batch.flip(-1)).flatten(1).all(dim=1)
    assert (same ^ mirrored).all()
    assert 150 < int(mirrored.sum()) < 250


def test_crops_are_windows_of_the_padded_image() -> None:
    batch, ids = images(200), np.arange(200)
    out = augment(batch, ids, kind="crop", seed=0, epoch=0)
    padded = torch.nn.functional.pad(batch, (2, 2, 2, 2))
    found = set()
    for row in range(200):
        places = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(out[row], padded[row, :, top : top + 16, left : left + 16])
        ]
        assert len(places) == 1
        found.update(places)
    assert len(found) == 25


@pytest.mark.parametrize("kind", ["flip", "crop", "crop_flip"])
def test_the_choice_is_the_example_s_own(kind: str) -> None:
    batch, ids = images(20), np.arange(100, 120)
    whole = augment(batch, ids, kind=kind, seed=1, epoch=2)
    picked = [7, 3, 19]
    assert torch.equal(
        augment(batch[picked], ids[picked], kind=kind, seed=1, epoch=2), whole[picked]
    )
    for seed, epoch in ((2, 2), (1, 3)):
        assert not torch.equal(augment(batch, ids, kind=kind, seed=seed, epoch=epoch), whole)


def test_normalising_gives_mean_0_and_deviation_1_and_leaves_the_source_alone() -> None:
    pixels = images(50).to(torch.uint8)
    before = pixels.clone()
    unit = pixels.float() / 255
    mean, std = unit.mean(dim=(0, 2, 3)), unit.std(dim=(0, 2, 3))
    scale = Scale(255.0, tuple(mean.tolist()), tuple(std.tolist()))
    out = Pipeline(scale, None, True, "none", 0)(pixels, np.arange(50), 0)
    assert out.dtype == torch.float32
    assert torch.allclose(out.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(out.std(dim=(0, 2, 3)), torch.ones(3), atol=1e-5)
    plain = Pipeline(scale, None, False, "none", 0)(pixels, np.arange(50), 0)
    assert torch.equal(plain, unit)
    assert torch.equal(pixels, before)
