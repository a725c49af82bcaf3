"""The manifest: what the files of a checkpoint hold, checked as a whole before anything is read.

    {"format": 1, "step": 400, "fingerprint": …, "strategy": "dp2", "position": …, "sync": …,
     "train": …, "optimizer": …, "aliases": {"head.weight": "embedding.weight"},
     "files": {"rank-00000.safetensors": 12345},
     "tensors": [{"name": "fc.weight", "dtype": "float32", "global_shape": [10, 64],
                  "offset": [0, 0], "shape": [5, 64], "file": "rank-00000.safetensors",
                  "key": "fc.weight[0:5,0:64]", "checksum": xxh3-128 of its bytes}, …],
     "checksum": xxh3-128 of all the rest}

A flipped bit in the manifest itself is found by its own checksum.

    manifest = Manifest.parse(text)        # ValueError says what is wrong
"""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from shoal.checkpoint.tensor_file import DTYPES
from shoal.layout import Slice, check_cover

FORMAT = 1
FILE_NAME = "manifest.json"


class Entry(BaseModel):
    """One piece: a box of the tensor `name`, under `key` in `file`."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    dtype: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")
    key: str
    checksum: str

    @cached_property
    def slice(self) -> Slice:
        return Slice(self.global_shape, self.offset, self.shape)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.name} has an unknown dtype {self.dtype!r}")
        self.slice  # noqa: B018  (made here so that an impossible one is refused here)
        return self


class Manifest(BaseModel):
    """The manifest of one checkpoint; keys that this version does not know are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: int
    shoal: str
    step: int = Field(ge=0)
    fingerprint: str
    strategy: str
    position: Any
    sync: Any
    train: Any
    optimizer: Any
    aliases: dict[str, str]
    files: dict[str, int]
    tensors: tuple[Entry, ...]

    @cached_property
    def pieces(self) -> Mapping[str, tuple[Entry, ...]]:
        """The pieces of each tensor, by name, in the order they were written."""
        table: dict[str, list[Entry]] = {}
        for entry in self.tensors:
            table.setdefault(entry.name, []).append(entry)
        return {name: tuple(entries) for name, entries in table.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, entries in self.pieces.items():
            if len({entry.dtype for entry in entries}) > 1:
                raise ValueError(f"the pieces of {name} have different dtypes")
            try:
                check_cover(entry.slice for entry in entries)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        for file in {entry.file for entry in self.tensors} - set(self.files):
            raise ValueError(f"{file} is not among its files")
        for alias, name in self.aliases.items():
            if name not in self.pieces:
                raise ValueError(f"{alias} stands for {name}, which it does not hold")
        return self

    def dump(self) -> bytes:
        """The text of the file. Raises ValueError where a value is NaN or infinite."""
        # As it will be read: keys of a mapping become strings on the way.
        values = json.loads(json.dumps(self.model_dump(), allow_nan=False))
        values["checksum"] = _checksum(values)
        return json.dumps(values).encode() + b"\n"

    @classmethod
    def parse(cls, text: bytes) -> "Manifest":
        """Read :meth:`dump`'s text. Raises ValueError that says what is wrong with it."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is not whole JSON: {error}") from error
        if not isinstance(values, dict) or "format" not in values:
            raise ValueError("it has no key `format`")
        if values["format"] != FORMAT:
            raise ValueError(
                f"its format is {values['format']!r}, and this version of Shoal reads {FORMAT}"
            )
        claimed = values.pop("checksum", None)
        if claimed != _checksum(values):
            raise ValueError("its checksum is not that of its content")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from error


def _checksum(values: Mapping[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())
