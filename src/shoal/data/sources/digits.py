"""Handwritten digits: the 1,797 grey images of 8x8 that scikit-learn ships.

    sklearn/datasets/data/digits.csv.gz      one image a line: 64 pixels 0..16, then the label

The split is fixed: 360 images, stratified by class and chosen by `shoal.data.splits.held_out`, are
`test`, the other 1,437 `train`; `all` is both. scikit-learn is found, not imported: that takes
longer than reading the file.

    Digits().load("train").pixels.shape      # (1437, 1, 8, 8)
"""

import gzip
import hashlib
import importlib.util
import zlib
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from shoal.data.sources.base import (
    ALL,
    TEST,
    TRAIN,
    Description,
    Images,
    Scale,
    Source,
    fingerprint,
    highest_label,
)
from shoal.data.splits import held_out
from shoal.errors import DataMissing

SIDE: Final = 8
EXAMPLES: Final = 1797
TEST_EXAMPLES: Final = 360
# Of the numbers as bytes, not of the file: recompressing it changes nothing.
SHA256: Final = "68aea062d35a127749050fa0e52dca09d6569ac08092c925610e0954e172dde2"
# Mean and deviation of the training split's pixels ÷ 16, measured.
SCALE: Final = Scale(highest=16.0, mean=(0.3052,), std=(0.3758,))


class Digits(Source):
    """The digits of scikit-learn. See the module."""

    name = "digits"

    @property
    def natural_splits(self) -> tuple[str, ...]:
        return (TRAIN, TEST)

    def describe(self, split: str | None) -> Description:
        split = self.check_split(split)
        path = _find()
        table = _read(path)
        labels = table[_chosen(split, table[:, -1]), -1]
        return Description(
            name=self.name,
            format="digits",
            split=split,
            examples=len(labels),
            classes=tuple(str(digit) for digit in range(10)),
            image_size=SIDE,
            in_channels=1,
            input_shape=(1, SIDE, SIDE),
            bytes=path.stat().st_size,
            fingerprint=fingerprint(self.name, split, SHA256),
            highest_label=highest_label(labels),
        )

    def load(self, split: str | None) -> Images:
        split = self.check_split(split)
        table = _read(_find())
        chosen = _chosen(split, table[:, -1])
        pixels = np.ascontiguousarray(table[chosen, :-1]).reshape(-1, 1, SIDE, SIDE)
        return Images(pixels, table[chosen, -1].astype(np.int64), SCALE)


def _chosen(split: str, labels: NDArray[np.uint8]) -> NDArray[np.intp]:
    if split == ALL:
        return np.arange(len(labels))
    held = held_out(labels, TEST_EXAMPLES)
    return np.flatnonzero(held if split == TEST else ~held)


def _find() -> Path:
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return path
    raise DataMissing(
        "digits: the images that scikit-learn ships are not on this machine",
        hint="install it: `pip install scikit-learn`",
    )


def _read(path: Path) -> NDArray[np.uint8]:
    """The table of the file, uint8 [1797, 65]. Raises DataMissing if it is another."""
    try:
        text = BytesIO(gzip.decompress(path.read_bytes()))
        table = np.loadtxt(text, delimiter=",", dtype=np.uint8, ndmin=2)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise _unlike(path, str(error)) from error
    if table.shape != (EXAMPLES, SIDE * SIDE + 1):
        raise _unlike(path, f"it holds {len(table):,} lines of {table.shape[1]} numbers")
    if hashlib.sha256(table.tobytes()).hexdigest() != SHA256:
        raise _unlike(path, "its numbers are others")
    return table


def _unlike(path: Path, found: str) -> DataMissing:
    return DataMissing(
        f"{path} is not the digits data that scikit-learn ships: {found}",
        hint="install it again: `pip install --force-reinstall scikit-learn`",
    )
