"""What is done to a batch of images: resize, augment, normalise; each row alone, by its own key.

    x = pixels ÷ highest        resized: shorter side to S (antialiased bilinear), centre S x S
    x = x[flip, crop]           training only: keyed by (seed, epoch, example)
    x = (x - mean) ÷ std        by channel, unless `normalize` is off

A row's result depends on that row and its key alone, so it is the same however a batch is cut.

    pipeline = Pipeline(scale, image_size=224, augment="crop_flip", seed=0)
    pipeline(pixels, ids, epoch=3)        # float32 [n, C, 224, 224]
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shoal.data.keyed import derive_key, keyed_below, keyed_bits
from shoal.data.sources import Scale

Augment = Literal["none", "flip", "crop", "crop_flip"]

_FLIP: Final = 0x666C6970  # "flip"
_CROP_Y: Final = 0x63726F7079  # "cropy"
_CROP_X: Final = 0x63726F7078  # "cropx"


@dataclass(frozen=True)
class Pipeline:
    """The transform of one feed. See the module."""

    scale: Scale
    image_size: int | None
    normalize: bool
    augment: Augment
    seed: int

    def __call__(self, pixels: Tensor, ids: NDArray[np.int64], epoch: int) -> Tensor:
        """uint8 [n, C, H, W] of the examples ``ids`` -> float32 [n, C, S, S]."""
        images = pixels.to(torch.float32)
        if self.image_size is not None:
            images = resize(images, self.image_size)
        if self.augment != "none" and len(ids):
            images = augment(images, ids, kind=self.augment, seed=self.seed, epoch=epoch)
        # In place: `to` has copied the pixels, so nothing of the source is written to.
        if not self.normalize:
            return images.div_(self.scale.highest)
        return images.sub_(self._mean).div_(self._deviation)

    @cached_property
    def _mean(self) -> Tensor:
        return torch.tensor(self.scale.mean).view(1, -1, 1, 1) * self.scale.highest

    @cached_property
    def _deviation(self) -> Tensor:
        return torch.tensor(self.scale.std).view(1, -1, 1, 1) * self.scale.highest


def as_they_are(inputs: Tensor, ids: NDArray[np.int64], epoch: int) -> Tensor:
    """The transform of token ids and features: none."""
    return inputs


def resize(images: Tensor, size: int) -> Tensor:
    """Shorter side to ``size``, then the centre square: float [n, C, H, W] -> [n, C, S, S]."""
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    if len(images) == 0:
        return images.new_empty((0, images.shape[1], size, size))
    shorter = min(height, width)
    target = [max(size, round(side * size / shorter)) for side in (height, width)]
    resized = functional.interpolate(
        images, size=target, mode="bilinear", align_corners=False, antialias=True
    )
    top, left = ((side - size) // 2 for side in target)
    return resized[:, :, top : top + size, left : left + size].contiguous()


def crop_padding(height: int, width: int) -> int:
    """How far a random crop may move: an eighth of the shorter side (4 of 32), 1 at least."""
    return max(1, round(min(height, width) / 8))


def augment(
    images: Tensor, ids: NDArray[np.int64], *, kind: Augment, seed: int, epoch: int
) -> Tensor:
    """Flip left to right by a coin, and cut the image from a frame of black around it.

    A new tensor of the images' shape and type. The choice for an example is a function of
    (seed, epoch, id).
    """
    count, channels, height, width = images.shape
    rows = np.arange(height)[np.newaxis, :].repeat(count, axis=0)
    columns = np.arange(width)[np.newaxis, :].repeat(count, axis=0)
    if kind in ("flip", "crop_flip"):
        flipped = keyed_bits(derive_key(_FLIP, seed, epoch), ids) >> np.uint64(63) == 1
        columns[flipped] = columns[flipped, ::-1]
    if kind in ("crop", "crop_flip"):
        pad = crop_padding(height, width)
        images = functional.pad(images, (pad, pad, pad, pad))
        moves = 2 * pad + 1
        rows = rows + keyed_below(derive_key(_CROP_Y, seed, epoch), ids, moves)[:, np.newaxis]
        columns = columns + keyed_below(derive_key(_CROP_X, seed, epoch), ids, moves)[:, np.newaxis]
    return images[
        torch.arange(count).view(-1, 1, 1, 1),
        torch.arange(channels).view(1, -1, 1, 1),
        torch.from_numpy(rows).view(count, 1, height, 1),
        torch.from_numpy(columns).view(count, 1, 1, width),
    ]
