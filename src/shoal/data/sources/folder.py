"""A folder of images, one subfolder a class, read as it is.

    photos/cat/001.jpg                photos/train/cat/001.jpg      split `train`
    photos/dog/a.png                  photos/test/cat/002.jpg       split `test` (or `val`, `valid`)

Classes are the names of the subfolders, sorted; images are numbered by class, then by name, so
the numbering is the same on every machine. Hidden files are left out. An image becomes the centre
square of its three channels at `image_size`: the side of the images themselves if those that were
looked at are squares of one size up to 224, otherwise 224.

    ImageFolder("photos", Path("photos")).describe("train").classes      # ("cat", "dog")
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from shoal.data.decode import SUFFIXES, picture_size, quiet_pillow
from shoal.data.sources.base import (
    ALL,
    TRAIN,
    Description,
    Files,
    Scale,
    Source,
    chosen_of_undivided,
    fingerprint,
    highest_label,
)
from shoal.errors import DataMissing

DEFAULT_IMAGE_SIZE: Final = 224
# In order of preference where a folder has several.
HELD_OUT_FOLDERS: Final = ("test", "val", "valid", "validation")
# Headers read to learn the size: 16 take about a millisecond.
_LOOKED_AT: Final = 16
# Mean and deviation of ImageNet's training images by channel, the field's usual constants.
_SCALE: Final = Scale(highest=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_SUFFIXES: Final = tuple(SUFFIXES)
_NEEDED: Final = f"needed: one subfolder a class with images ({', '.join(sorted(SUFFIXES))}) in it"


class _Image(NamedTuple):
    name: str
    bytes: int
    label: int


class ImageFolder(Source):
    """A folder with a subfolder of images for each class. See the module."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        self._listed: dict[str, tuple[_Image, ...]] = {}

    @property
    def natural_splits(self) -> tuple[str, ...]:
        held_out = [name for name in HELD_OUT_FOLDERS if name in self._parts]
        return (TRAIN, *held_out) if held_out else ()

    def describe(self, split: str | None) -> Description:
        split = self.check_split(split)
        images = self._images(split)
        size = self._image_size
        labels = np.array([image.label for image in images], dtype=np.int64)
        return Description(
            name=self.name,
            format="image folder",
            split=split,
            examples=len(images),
            classes=self._classes,
            image_size=size,
            in_channels=3,
            input_shape=(3, size, size),
            bytes=sum(image.bytes for image in images),
            fingerprint=fingerprint(
                "image folder", split, *(f"{image.bytes} {image.name}" for image in images)
            ),
            highest_label=highest_label(labels),
        )

    def load(self, split: str | None) -> Files:
        images = self._images(self.check_split(split))
        return Files(
            root=self.root,
            names=tuple(image.name for image in images),
            labels=np.array([image.label for image in images], dtype=np.int64),
            image_size=self._image_size,
            scale=_SCALE,
        )

    @cached_property
    def _parts(self) -> dict[str, Path]:
        """Where each split lies, by its name in small letters; just the root if undivided."""
        inside = {path.name.lower(): path for path in _subfolders(self.root)}
        train = inside.get(TRAIN)
        # A class may be called "train": it holds images where a split holds folders.
        if train is None or not _subfolders(train):
            return {TRAIN: self.root}
        return {name: inside[name] for name in (TRAIN, *HELD_OUT_FOLDERS) if name in inside}

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        """The class folders of the training split. Raises DataMissing if there are none."""
        base = self._parts[TRAIN]
        folders = _subfolders(base)
        if folders:
            return tuple(folder.name for folder in folders)
        loose = sum(1 for path in _entries(base) if _is_picture(path.name))
        found = f"{loose:,} images and no class folders" if loose else "no class folders"
        raise DataMissing(f"the folder {base} holds {found}", hint=f"{_NEEDED} ({base}/cat/1.jpg)")

    @cached_property
    def _image_size(self) -> int:
        """Of the whole set, so that every split gives images of one size."""
        quiet_pillow()
        images = self._part(TRAIN)
        chosen = np.unique(np.linspace(0, len(images) - 1, _LOOKED_AT).astype(int))
        sizes = {picture_size(self.root / images[index].name) for index in chosen} - {None}
        if len(sizes) == 1 and (size := sizes.pop()) is not None:
            width, height = size
            if width == height <= DEFAULT_IMAGE_SIZE:
                return width
        return DEFAULT_IMAGE_SIZE

    def _images(self, split: str) -> list[_Image]:
        if self.natural_splits:
            parts = list(self._parts) if split == ALL else [split]
            return [image for part in parts for image in self._part(part)]
        images = self._part(TRAIN)
        labels = np.array([image.label for image in images], dtype=np.int64)
        return [images[index] for index in chosen_of_undivided(split, labels)]

    def _part(self, part: str) -> tuple[_Image, ...]:
        """The images of a natural split, listed once."""
        if part not in self._listed:
            self._listed[part] = self._list(part)
        return self._listed[part]

    def _list(self, part: str) -> tuple[_Image, ...]:
        base = self._parts[part]
        known = {name: label for label, name in enumerate(self._classes)}
        strangers = [folder.name for folder in _subfolders(base) if folder.name not in known]
        if strangers:
            raise DataMissing(
                f"{base} has class folders that {self._parts[TRAIN]} has not: {_some(strangers)}",
                hint="rename or remove them: a network cannot answer with a class it never saw",
            )
        images = {name: self._class_images(base / name, label) for name, label in known.items()}
        empty = [name for name, found in images.items() if not found]
        if empty and part == TRAIN:
            raise DataMissing(
                f"class folders of {base} without images: {_some(empty)}",
                hint=f"{_NEEDED}; put images into them, or remove them",
            )
        if len(empty) == len(images):
            raise DataMissing(f"the folder {base} holds no images", hint=_NEEDED)
        return tuple(image for found in images.values() for image in found)

    def _class_images(self, folder: Path, label: int) -> list[_Image]:
        if not folder.is_dir():
            return []
        # A slice: `os.path.relpath` for each of 50,000 images takes longer than listing them.
        start = len(str(self.root / "x")) - 1
        return sorted(
            _Image(entry.path[start:], entry.stat().st_size, label)
            for entry in _walk(str(folder))
            if _is_picture(entry.name)
        )


def _walk(folder: str) -> Iterator["os.DirEntry[str]"]:
    """Every file below a folder; links to folders are not followed, as they may lead in circles."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path)
            elif entry.is_file():
                yield entry


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _is_picture(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
