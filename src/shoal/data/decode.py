"""An image file to the pixels that a network sees: the centre square, RGB, at one size.

    decode(path, 64)      # uint8 [3, 64, 64]

The square is cut from the middle and resized with an antialiased bilinear filter in one step.
Transparent pixels become white; 16-bit grey keeps its upper 8 bits; orientation tags are not
applied.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".pgm"})
# Pillow goes by content. Left out are formats that would run another program (EPS) or that no
# camera or exporter hides behind these suffixes.
_FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "PPM", "GIF", "TIFF")

_TRANSPARENT: Final = ("RGBA", "RGBa", "LA", "La", "PA")


def quiet_pillow() -> None:
    """Keep Pillow's warnings (large images, odd tags) from the user's terminal, in this process.

    Called once by whoever reads files, before any thread does: `warnings.catch_warnings` around
    each image would race between threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def picture_size(path: Path) -> tuple[int, int] | None:
    """(width, height) from an image file's header; None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as picture:
            return picture.size
    # Pillow's decoders raise a dozen kinds on damaged files; reading the image will say which.
    except Exception:
        return None


def decode(path: Path, size: int) -> NDArray[np.uint8]:
    """The centre square of an image file at `size`: uint8 [3, size, size].

    Raises what Pillow raises: OSError, and several others, for files that are damaged, cut short,
    empty or no images.
    """
    from PIL import Image

    with Image.open(path, formats=_FORMATS) as picture:
        # JPEG decodes at a half, a quarter or an eighth of its size at a fraction of the cost, as
        # long as that still is larger than what is asked for.
        picture.draft(None, (size, size))
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        square = _rgb(picture)
        if (width, height) != (size, size):
            box = (left, top, left + side, top + side)
            square = square.resize((size, size), Image.Resampling.BILINEAR, box=box)
        pixels = np.asarray(square, dtype=np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def reason(path: Path, error: Exception) -> str:
    """Why an image could not be decoded, in few words and without the path."""
    try:
        if path.stat().st_size == 0:
            return "the file is empty"
    except OSError as missing:
        return missing.strerror or str(missing)
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image in a known format"
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def _rgb(picture: "Picture") -> "Picture":
    from PIL import Image

    if picture.mode.startswith("I"):
        grey = (np.asarray(picture, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if picture.mode in _TRANSPARENT or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")
