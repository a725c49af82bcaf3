"""What every source of examples answers: what is there, which splits it has, and the examples.

    locate("digits").describe("train")      -> Description       cheap: names, headers, labels
    locate("digits").load("train")          -> Images | Arrays | Files    what a feed reads from

A format is one file beside this one with one final class. Nothing here needs torch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from shoal.data.splits import held_out, tenth
from shoal.errors import DataMissing

ALL = "all"
TRAIN = "train"
TEST = "test"

Format = Literal["digits", "idx", "image folder", "npz"]
Kind = Literal["images", "tokens", "features"]


@dataclass(frozen=True)
class Description:
    """What a source holds in one split, as far as a cheap look can tell.

    ``image_size`` is the side of the square that a feed gives (None: not square, or no images),
    ``in_channels`` None where there are no images, ``input_shape`` that of one example (of an
    image: channels, height, width), ``bytes`` the size of the files on disk. ``highest_label`` is
    (label, the first example that has it).
    """

    name: str
    format: Format
    split: str
    examples: int
    classes: tuple[str, ...] | None
    image_size: int | None
    in_channels: int | None
    input_shape: tuple[int, ...]
    bytes: int
    fingerprint: str
    highest_label: tuple[int, int] | None = None
    kind: Kind = "images"

    @property
    def num_classes(self) -> int | None:
        """How many outputs a classifier of this set needs; None where labels were not read."""
        return None if self.classes is None else len(self.classes)


@dataclass(frozen=True)
class Scale:
    """Pixels to numbers of mean 0 and deviation 1: (pixel / highest - mean) / std by channel."""

    highest: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Images:
    """Examples that fit in memory: pixels uint8 [N, C, H, W], labels int64 [N]."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    scale: Scale

    def select(self, chosen: NDArray[np.integer]) -> "Images":
        """The examples at these indices, in that order."""
        return Images(self.pixels[chosen], self.labels[chosen], self.scale)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Examples in memory that the model gets as they are: token ids int64 or features float32."""

    inputs: NDArray[np.int64] | NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Files:
    """Examples that are one image file each: `root / names[i]`, labels int64 [N].

    A feed turns each into a square of `image_size` with the three channels of RGB.
    """

    root: Path
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    image_size: int
    scale: Scale


class Source(ABC):
    """A set of examples where it lies on disk, split or not."""

    name: str

    @property
    @abstractmethod
    def natural_splits(self) -> tuple[str, ...]:
        """The splits that the files themselves have, the training one first; empty if undivided."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split that can be asked for."""
        return (*(self.natural_splits or (TRAIN, TEST)), ALL)

    @property
    def default_split(self) -> str:
        """What is read where nothing is said: the training files, or everything if undivided."""
        return self.natural_splits[0] if self.natural_splits else ALL

    @property
    def evaluation_split(self) -> str | None:
        """The split that the files hold out for evaluation, if they do."""
        return self.natural_splits[1] if len(self.natural_splits) > 1 else None

    def check_split(self, split: str | None) -> str:
        """The split to read. Raises DataMissing that names those there are."""
        if split is None:
            return self.default_split
        if split not in self.splits:
            raise DataMissing(
                f"{self.name} has no split {split!r}",
                hint=f"it has: {', '.join(self.splits)}",
            )
        return split

    @abstractmethod
    def describe(self, split: str | None) -> Description:
        """What is there, without decoding it. Raises DataMissing."""

    @abstractmethod
    def load(self, split: str | None) -> Images | Arrays | Files:
        """The examples of a split, ready to be read by index. Raises DataMissing."""


def chosen_of_undivided(split: str, labels: NDArray[np.integer]) -> NDArray[np.intp]:
    """The indices that a split of an undivided set consists of: all, nine tenths, or a tenth."""
    if split == ALL:
        return np.arange(len(labels))
    held = held_out(labels, tenth(len(labels)))
    return np.flatnonzero(held if split == TEST else ~held)


def size_of_undivided(split: str, examples: int) -> int:
    """How many examples `chosen_of_undivided` gives, without the labels."""
    held = tenth(examples)
    return {ALL: examples, TRAIN: examples - held, TEST: held}[split]


def highest_label(labels: NDArray[np.integer]) -> tuple[int, int] | None:
    """(label, first example that has it); None for no examples."""
    if len(labels) == 0:
        return None
    example = int(labels.argmax())
    return int(labels[example]), example


def fingerprint(*parts: bytes | str) -> str:
    """XXH3-128 of some parts, each with its length so that they cannot run into one another."""
    digest = xxhash.xxh3_128()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
