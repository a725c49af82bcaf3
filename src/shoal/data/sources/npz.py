"""NumPy archives, as `numpy.savez` writes them: images, token ids or vectors, read as they are.

    inputs     uint8 [N, H, W] or [N, C, H, W]     images: scaled as other images are
               any integers [N, L]                 token ids: given to the model as int64
               floating point [N, …]               features: given to the model as float32
    targets    integers [N]                        labels
    evaluate_inputs, evaluate_targets              split `test`, if they are there

Without the last two a fixed tenth is held out. Nothing is unpickled: an archive of objects is
refused.

    Npz("reviews.npz", Path("reviews.npz")).load("train").inputs.shape      # (9509, 64)
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shoal.data.sources.base import (
    ALL,
    TEST,
    TRAIN,
    Arrays,
    Description,
    Images,
    Kind,
    Scale,
    Source,
    chosen_of_undivided,
    fingerprint,
    highest_label,
)
from shoal.errors import DataMissing

_PREFIX: Final = {TRAIN: "", TEST: "evaluate_"}
# Figures of its own would differ between the splits of a set.
_SCALE: Final = Scale(highest=255.0, mean=(0.5,), std=(0.5,))
_NEEDED: Final = (
    "needed: `inputs` (uint8 images [N, H, W] or [N, C, H, W], integer tokens [N, L], or floats) "
    "and `targets` (integers [N]), as `numpy.savez(path, inputs=…, targets=…)` writes them"
)
# What a file that is damaged or is something else makes zipfile and numpy raise.
_UNREADABLE: Final = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class _Header:
    """What an archive says of one array, before its numbers are read."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    bytes: int
    checksum: int

    @property
    def mark(self) -> str:
        """Tells its contents from others: the checksum is of every number."""
        return f"{self.name} {self.shape} {self.dtype.str} {self.checksum:08x}"


class Npz(Source):
    """A NumPy archive. See the module."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self._headers = _read_headers(path)

    @property
    def natural_splits(self) -> tuple[str, ...]:
        return (TRAIN, TEST) if "evaluate_inputs" in self._headers else ()

    def describe(self, split: str | None) -> Description:
        split = self.check_split(split)
        pairs = [self._pair(part) for part in self._parts(split)]
        # Labels are 8 bytes an example: a million are read in some milliseconds.
        labels = self._labels(split)
        kind = _kind(self.path, pairs[0][0])
        shape = _shape(kind, pairs[0][0])
        square = kind == "images" and shape[1] == shape[2]
        return Description(
            name=self.name,
            format="npz",
            split=split,
            examples=len(labels),
            classes=self._classes(),
            image_size=shape[1] if square else None,
            in_channels=shape[0] if kind == "images" else None,
            input_shape=shape,
            bytes=sum(header.bytes for pair in pairs for header in pair),
            fingerprint=fingerprint("npz", split, *(h.mark for pair in pairs for h in pair)),
            highest_label=highest_label(labels),
            kind=kind,
        )

    def load(self, split: str | None) -> Images | Arrays:
        split = self.check_split(split)
        pairs = [self._pair(part) for part in self._parts(split)]
        inputs = _joined([self._read(header) for header, _ in pairs])
        labels = self._targets(split)
        if not self.natural_splits and split != ALL:
            chosen = chosen_of_undivided(split, labels)
            inputs, labels = inputs[chosen], labels[chosen]
        kind = _kind(self.path, pairs[0][0])
        if kind == "images":
            return Images(inputs.reshape(len(inputs), *_shape(kind, pairs[0][0])), labels, _SCALE)
        if kind == "tokens":
            return Arrays(inputs.astype(np.int64), labels)
        return Arrays(inputs.astype(np.float32), labels)

    def _parts(self, split: str) -> tuple[str, ...]:
        if not self.natural_splits:
            return (TRAIN,)
        return (TRAIN, TEST) if split == ALL else (split,)

    def _pair(self, part: str) -> tuple[_Header, _Header]:
        """The headers of a part's inputs and targets, checked against each other and `inputs`."""
        inputs, targets = (self._header(_PREFIX[part] + name) for name in ("inputs", "targets"))
        first = self._header("inputs")
        if targets.dtype.kind not in "iu" or targets.shape != inputs.shape[:1]:
            raise DataMissing(
                f"{self.path}: `{targets.name}` is {_said(targets)}, "
                f"`{inputs.name}` {_said(inputs)}",
                hint=_NEEDED,
            )
        if not inputs.shape[0]:
            raise DataMissing(f"{self.path} has no examples in `{inputs.name}`", hint=_NEEDED)
        if (_kind(self.path, inputs), inputs.shape[1:]) != (
            _kind(self.path, first),
            first.shape[1:],
        ):
            raise DataMissing(
                f"{self.path}: `{inputs.name}` is {_said(inputs)}, `inputs` {_said(first)}",
                hint="both must hold examples of one kind and shape",
            )
        return inputs, targets

    def _header(self, name: str) -> _Header:
        if name not in self._headers:
            has = ", ".join(f"`{key}`" for key in self._headers) or "no arrays"
            raise DataMissing(f"{self.path} lacks `{name}`; it has {has}", hint=_NEEDED)
        return self._headers[name]

    def _targets(self, split: str) -> NDArray[np.int64]:
        targets = [self._read(self._pair(part)[1]) for part in self._parts(split)]
        return np.concatenate(targets).astype(np.int64)

    def _labels(self, split: str) -> NDArray[np.int64]:
        labels = self._targets(split)
        return labels if self.natural_splits else labels[chosen_of_undivided(split, labels)]

    def _classes(self) -> tuple[str, ...]:
        """Of the whole file, so that every split has the same."""
        return tuple(str(label) for label in range(int(self._targets(ALL).max()) + 1))

    def _read(self, header: _Header) -> NDArray[Any]:
        try:
            with (
                zipfile.ZipFile(self.path) as archive,
                archive.open(f"{header.name}.npy") as member,
            ):
                array: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        except _UNREADABLE as error:
            raise DataMissing(
                f"{self.path} is damaged: `{header.name}` cannot be read: {error}",
                hint="get or write the file again",
            ) from error
        return array


def is_npz(path: Path) -> bool:
    """Whether a file is a zip archive, the form of `.npz`."""
    return zipfile.is_zipfile(path)


def _read_headers(path: Path) -> dict[str, _Header]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            headers = [_read_header(archive, info) for info in members]
    except _UNREADABLE as error:
        raise DataMissing(f"{path} cannot be read: {error}", hint=_NEEDED) from error
    return {header.name: header for header in headers}


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Header:
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in read:
            raise ValueError(f"`{info.filename}` has an unknown version {version}")
        shape, _, dtype = read[version](member)
    name = info.filename.removesuffix(".npy")
    return _Header(name, shape, dtype, info.compress_size, info.CRC)


def _kind(path: Path, header: _Header) -> Kind:
    dimensions = len(header.shape)
    if header.dtype == np.uint8 and dimensions in (3, 4):
        return "images"
    if header.dtype.kind in "iu" and dimensions == 2:
        return "tokens"
    if header.dtype.kind == "f" and dimensions >= 2:
        return "features"
    raise DataMissing(f"{path}: `{header.name}` is {_said(header)}", hint=_NEEDED)


def _shape(kind: Kind, header: _Header) -> tuple[int, ...]:
    """That of one example as the model sees it."""
    grey = kind == "images" and len(header.shape) == 3
    return (1, *header.shape[1:]) if grey else header.shape[1:]


def _said(header: _Header) -> str:
    return f"{header.dtype.name} [{', '.join(f'{size:,}' for size in header.shape)}]"


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
