"""Sources of examples: one file a format, found by a known name or by looking at the files.

locate("digits")     locate("fashion-mnist")     locate("path/to/images")     locate("set.npz")
"""

from difflib import get_close_matches
from pathlib import Path
from typing import Final

from shoal.data.sources.base import (
    ALL,
    TEST,
    TRAIN,
    Arrays,
    Description,
    Files,
    Images,
    Scale,
    Source,
)
from shoal.data.sources.digits import Digits
from shoal.data.sources.folder import ImageFolder
from shoal.data.sources.idx import KNOWN_SETS, Idx, is_idx_folder, known_set
from shoal.data.sources.npz import Npz, is_npz
from shoal.env import data_home
from shoal.errors import DataMissing

__all__ = [
    "ALL",
    "KNOWN_NAMES",
    "TEST",
    "TRAIN",
    "Arrays",
    "Description",
    "Digits",
    "Files",
    "Idx",
    "ImageFolder",
    "Images",
    "Npz",
    "Scale",
    "Source",
    "locate",
]

KNOWN_NAMES: Final = (Digits.name, *KNOWN_SETS)


def locate(source: str) -> Source:
    """The source of a known name or of a path.

    Raises DataMissing that says what was found there and what is needed.
    """
    if source == Digits.name:
        return Digits()
    if source in KNOWN_SETS:
        return known_set(source, data_home())
    path = Path(source).expanduser()
    if path.is_dir():
        return Idx(source, path) if is_idx_folder(path) else ImageFolder(source, path)
    if path.exists():
        if path.suffix == ".npz" or (path.is_file() and is_npz(path)):
            return Npz(source, path)
        raise DataMissing(
            f"{source} is a file, and no NumPy archive (.npz)",
            hint="needed: a folder with one subfolder of images a class, a folder of IDX files, or "
            "a .npz file",
        )
    near = get_close_matches(source, KNOWN_NAMES, n=1)
    raise DataMissing(
        f"{source} is not there: neither a known data set nor a folder",
        hint=(f"did you mean `{near[0]}`? " if near else "")
        + f"known data sets: {', '.join(KNOWN_NAMES)}; a folder is given by its path",
    )
