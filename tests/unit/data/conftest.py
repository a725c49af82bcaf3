"""Small sets of real files, written by the tests that read them."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteIdx = Callable[..., Path]
WriteFolder = Callable[..., Path]


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def write_idx(tmp_path: Path) -> WriteIdx:
    """Write IDX files of n random 6x6 images with labels 0, 1, …, 9, 0, …; give the folder."""

    def write(
        name: str = "idx",
        *,
        train: int = 50,
        test: int = 20,
        zipped: bool = True,
        separator: str = "-",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        generator = np.random.default_rng(7)
        for prefix, count in (("train", train), ("t10k", test)):
            if not count:
                continue
            images = generator.integers(0, 256, (count, 6, 6))
            for kind, array in (("images", images), ("labels", np.arange(count) % 10)):
                stem = f"{prefix}-{kind}{separator}idx{array.ndim}-ubyte"
                data = idx_bytes(array)
                path = folder / (f"{stem}.gz" if zipped else stem)
                path.write_bytes(gzip.compress(data, mtime=0) if zipped else data)
        return folder

    return write


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """Write `class/NNN.suffix` images of random colours, some counts a class; give the folder."""

    def write(
        name: str,
        counts: dict[str, int],
        *,
        size: tuple[int, int] = (12, 12),
        suffix: str = "png",
        seed: int = 3,
    ) -> Path:
        generator = np.random.default_rng(seed)
        for label, count in counts.items():
            folder = tmp_path / name / label
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:03d}.{suffix}")
        return tmp_path / name

    return write
