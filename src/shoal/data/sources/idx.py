"""IDX files, the form of MNIST and its relatives, gzipped or not.

    train-images-idx3-ubyte[.gz]   train-labels-idx1-ubyte[.gz]      split `train`
    t10k-images-idx3-ubyte[.gz]    t10k-labels-idx1-ubyte[.gz]       split `test`, if they are there

A file is 0 0 8 n (8: unsigned bytes, n: dimensions), n big-endian 32-bit sizes, then the bytes (the
form is described on the page of the MNIST database, Y. LeCun, C. Cortes & C. Burges). Without the
t10k files a fixed tenth is held out. Two sets are known by name, `fashion-mnist` and `mnist`.

    Idx("fashion-mnist", folder).load("train").pixels.shape      # (60000, 1, 28, 28)
"""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
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
    chosen_of_undivided,
    fingerprint,
    highest_label,
    size_of_undivided,
)
from shoal.errors import DataMissing

_PREFIX: Final = {TRAIN: "train", TEST: "t10k"}
_KINDS: Final = {3: ("images", "idx3"), 1: ("labels", "idx1")}
_GZIP: Final = b"\x1f\x8b"
# Above this, labels are not read just to describe a set: reading them is a few milliseconds a MB.
_LABELS_READ_BYTES: Final = 1 << 20
_MARK_BYTES: Final = 1 << 16


@dataclass(frozen=True)
class KnownSet:
    """What is known of a set by its name: classes, scale, and how to get its four files."""

    classes: tuple[str, ...]
    scale: Scale
    folders: tuple[str, ...]
    get: str


_BY_HAND: Final = (
    "put its four files (train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
    "t10k-labels-idx1-ubyte, each may end in .gz) into a folder and `--set data.train=FOLDER`"
)

# Means and deviations are of the training pixels ÷ 255.
KNOWN_SETS: Final = {
    "fashion-mnist": KnownSet(
        classes=(
            "t-shirt",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "ankle boot",
        ),
        scale=Scale(highest=255.0, mean=(0.2860,), std=(0.3530,)),
        folders=("/usr/share/datasets/fashion-mnist",),
        get=f"on Debian and Ubuntu: `apt-get install dataset-fashion-mnist`; elsewhere {_BY_HAND}",
    ),
    "mnist": KnownSet(
        classes=tuple(str(digit) for digit in range(10)),
        scale=Scale(highest=255.0, mean=(0.1307,), std=(0.3081,)),
        folders=(),
        get=_BY_HAND,
    ),
}

# Of a set that is not known: its own figures would differ between its splits.
_UNKNOWN_SCALE: Final = Scale(highest=255.0, mean=(0.5,), std=(0.5,))


@dataclass(frozen=True)
class _IdxFile:
    path: Path
    sizes: tuple[int, ...]
    gzipped: bool

    @property
    def header_bytes(self) -> int:
        return 4 + 4 * len(self.sizes)

    @property
    def needed_bytes(self) -> int:
        return self.header_bytes + int(np.prod(self.sizes, dtype=np.int64))


class Idx(Source):
    """A folder of IDX files. See the module."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder

    @property
    def natural_splits(self) -> tuple[str, ...]:
        return (TRAIN, TEST) if _find(self.folder, TEST, 3) else ()

    def describe(self, split: str | None) -> Description:
        split = self.check_split(split)
        pairs = [self._open(part) for part in self._parts(split)]
        files = [file for pair in pairs for file in pair]
        examples = sum(images.sizes[0] for images, _ in pairs)
        if not self.natural_splits:
            examples = size_of_undivided(split, examples)
        labels = self._labels_if_small(split, [labels for _, labels in pairs])
        _, height, width = pairs[0][0].sizes
        return Description(
            name=self.name,
            format="idx",
            split=split,
            examples=examples,
            classes=self._classes(),
            image_size=height if height == width else None,
            in_channels=1,
            input_shape=(1, height, width),
            bytes=sum(file.path.stat().st_size for file in files),
            fingerprint=fingerprint("idx", split, *map(_mark, files)),
            highest_label=None if labels is None else highest_label(labels),
        )

    def load(self, split: str | None) -> Images:
        split = self.check_split(split)
        pairs = [self._open(part) for part in self._parts(split)]
        pixels = _joined([_read(images) for images, _ in pairs])[:, np.newaxis]
        labels = _joined([_read(labels) for _, labels in pairs]).astype(np.int64)
        known = KNOWN_SETS.get(self.name)
        images = Images(pixels, labels, known.scale if known else _UNKNOWN_SCALE)
        if self.natural_splits or split == ALL:
            return images
        return images.select(chosen_of_undivided(split, labels))

    def _parts(self, split: str) -> tuple[str, ...]:
        if not self.natural_splits:
            return (TRAIN,)
        return (TRAIN, TEST) if split == ALL else (split,)

    def _open(self, part: str) -> tuple[_IdxFile, _IdxFile]:
        images, labels = (self._header(part, dimensions) for dimensions in (3, 1))
        if images.sizes[0] != labels.sizes[0]:
            raise DataMissing(
                f"{images.path} holds {images.sizes[0]:,} images, "
                f"{labels.path.name} {labels.sizes[0]:,} labels",
                hint="both must come from the same set: get both files again",
            )
        if min(images.sizes) == 0:
            raise DataMissing(
                f"{images.path} holds no images: its header says "
                f"{' × '.join(map(str, images.sizes))}",
                hint="at least one image is needed",
            )
        return images, labels

    def _header(self, part: str, dimensions: int) -> _IdxFile:
        path = _find(self.folder, part, dimensions)
        if path is None:
            kind, idx = _KINDS[dimensions]
            raise DataMissing(
                f"{self.name}: {self.folder} lacks {_PREFIX[part]}-{kind}-{idx}-ubyte (or .gz)",
                hint=KNOWN_SETS[self.name].get if self.name in KNOWN_SETS else None,
            )
        return _read_header(path, dimensions)

    def _labels_if_small(self, split: str, files: Sequence[_IdxFile]) -> NDArray[np.integer] | None:
        if sum(file.needed_bytes for file in files) > _LABELS_READ_BYTES:
            return None
        labels = _joined([_read(file) for file in files])
        return labels if self.natural_splits else labels[chosen_of_undivided(split, labels)]

    def _classes(self) -> tuple[str, ...] | None:
        """Of the whole set, so that every split has the same; the names of a known set."""
        if self.name in KNOWN_SETS:
            return KNOWN_SETS[self.name].classes
        files = [self._header(part, 1) for part in self._parts(ALL)]
        if sum(file.needed_bytes for file in files) > _LABELS_READ_BYTES:
            return None
        highest = max(int(_read(file).max(initial=0)) for file in files)
        return tuple(str(label) for label in range(highest + 1))


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder holds files named as IDX training images."""
    return _find(folder, TRAIN, 3) is not None


def known_set(name: str, home: Path | None) -> Idx:
    """A set known by name, from the data home or where its package puts it.

    Raises DataMissing that says how to get it.
    """
    known = KNOWN_SETS[name]
    folders = [*([home / name] if home else []), *map(Path, known.folders)]
    for folder in folders:
        if is_idx_folder(folder):
            return Idx(name, folder)
    looked = " and ".join(str(folder) for folder in folders) or "no folder: no data home is set"
    raise DataMissing(f"{name} is not on this machine (looked in {looked})", hint=known.get)


def _find(folder: Path, part: str, dimensions: int) -> Path | None:
    kind, idx = _KINDS[dimensions]
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = folder / f"{_PREFIX[part]}-{kind}{separator}{idx}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def _read_header(path: Path, dimensions: int) -> _IdxFile:
    """The sizes that a file claims, checked against its length. Raises DataMissing."""
    needed = f"needed: an IDX file of unsigned bytes with {dimensions} dimension(s)"
    try:
        with path.open("rb") as raw:
            gzipped = raw.read(2) == _GZIP
        with gzip.open(path) if gzipped else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
    except (OSError, EOFError, zlib.error) as error:
        raise DataMissing(f"{path} cannot be read: {error}", hint=needed) from error
    if header[:4] != bytes((0, 0, 8, dimensions)) or len(header) < 4 + 4 * dimensions:
        raise DataMissing(
            f"{path} is no such file: it begins with {header[:4].hex(' ')}", hint=needed
        )
    sizes = tuple(int(size) for size in np.frombuffer(header, ">u4", dimensions, 4))
    file_ = _IdxFile(path, sizes, gzipped)
    if _length(file_) != file_.needed_bytes:
        # The length that a gzip file notes at its end is not all of it where it has several
        # members: only a full read decides.
        _read(file_)
    return file_


def _mark(file: _IdxFile) -> bytes:
    """What tells one file from another: its length and beginning.

    The header alone would not do: those of MNIST and Fashion-MNIST are the same.
    """
    with file.path.open("rb") as raw:
        return f"{file.path.stat().st_size} ".encode() + raw.read(_MARK_BYTES)


def _length(file: _IdxFile) -> int:
    """The length after decompression, as far as it can be told without decompressing."""
    if not file.gzipped:
        return file.path.stat().st_size
    with file.path.open("rb") as raw:
        raw.seek(-4, 2)
        return int.from_bytes(raw.read(4), "little")


def _read(file: _IdxFile) -> NDArray[np.uint8]:
    try:
        data = file.path.read_bytes()
        data = gzip.decompress(data) if file.gzipped else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataMissing(
            f"{file.path} is damaged: {error}",
            hint=f"needed: {_meaning(file)}; get the file again",
        ) from error
    if len(data) != file.needed_bytes:
        raise DataMissing(
            f"{file.path} holds {len(data):,} bytes",
            hint=f"needed: {_meaning(file)}; get the file again",
        )
    return np.frombuffer(data, np.uint8, offset=file.header_bytes).reshape(file.sizes)


def _meaning(file: _IdxFile) -> str:
    sizes = " × ".join(f"{size:,}" for size in file.sizes)
    return f"{file.needed_bytes:,} bytes, as its header says ({sizes})"


def _joined(parts: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise DataMissing(
            f"the splits hold images of different sizes: {sorted(shapes)}",
            hint="read one split at a time",
        )
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
