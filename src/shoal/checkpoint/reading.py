"""Reading a checkpoint: any box of any tensor, and only bytes whose checksum is right.

saved:   [ rank 0 | rank 1 | rank 2 ]           wanted:   [      |-----------)  ]
         each piece is checked once, then the part of it that is wanted is copied

checkpoint = Checkpoint.open(folder / "step-000000400")
checkpoint.read("fc.weight")                                   # whole
checkpoint.read("fc.weight", Slice((10, 64), (5, 0), (5, 64)))   # rows 5 to 10
"""

import difflib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.checkpoint import folder, tensor_file
from shoal.checkpoint.manifest import FILE_NAME, Entry, Manifest
from shoal.errors import CheckpointDamaged, RunError
from shoal.layout import Part, Slice


class Checkpoint:
    """A checkpoint on disk whose manifest is whole; made by :meth:`open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._checked: set[tuple[str, str]] = set()

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read and check the manifest. Raises `CheckpointDamaged` naming file and fault."""
        file = path / FILE_NAME
        try:
            return cls(path, Manifest.parse(file.read_bytes()))
        except OSError as error:
            raise _damaged(file, error.strerror or str(error)) from error
        except ValueError as error:
            raise _damaged(file, str(error)) from error

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors it holds, without aliases, in the order they were saved."""
        return tuple(self.manifest.pieces)

    @property
    def weights(self) -> tuple[str, ...]:
        """The names that are parameters and buffers: all but optimizer state."""
        return tuple(name for name in self.names if name.rpartition("/")[0] not in self)

    def __contains__(self, name: object) -> bool:
        return name in self.manifest.pieces or name in self.manifest.aliases

    def dtype(self, name: str) -> torch.dtype:
        return tensor_file.DTYPES[self._entries(name)[0].dtype][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape."""
        return self._entries(name)[0].global_shape

    def verify(self) -> None:
        """Check every file's presence and length and every piece's checksum.

        Raises `CheckpointDamaged` naming the file and the tensor. One tensor is in memory at a
        time.
        """
        for name in self.manifest.files:
            self._check_length(name)
        for entry in self.manifest.tensors:
            self._piece(entry)

    def read_part(self, name: str, part: Part) -> Tensor:
        """A new contiguous CPU tensor of this part of the tensor or alias `name`; as `read`."""
        if len(part.boxes) == 1:
            return self.read(name, part.boxes[0])
        result = torch.empty(part.shape, dtype=self.dtype(name))
        for box, index in part.places():
            result[index] = self.read(name, box)
        return result

    def read(self, name: str, part: Slice | None = None) -> Tensor:
        """A new contiguous CPU tensor of this box (default: all) of the tensor or alias `name`.

        Raises `CheckpointDamaged` if a piece is not what was written, `RunError` where there is no
        such tensor or `part` is of a tensor of another shape.
        """
        entries = self._entries(name)
        wanted = Slice.whole(entries[0].global_shape) if part is None else part
        if wanted.global_shape != entries[0].global_shape:
            raise RunError(
                f"{name} has shape {entries[0].global_shape} in {self.path}, and "
                f"{wanted.global_shape} is asked for",
                hint="the model is not the one that was saved",
            )
        result = torch.empty(wanted.shape, dtype=self.dtype(name))
        for entry in entries:
            common = entry.slice.intersection(wanted)
            if common is not None:
                piece = self._piece(entry)
                result[common.index_within(wanted)] = piece[common.index_within(entry.slice)]
        return result

    def _entries(self, name: str) -> tuple[Entry, ...]:
        name = self.manifest.aliases.get(name, name)
        if name not in self.manifest.pieces:
            nearest = difflib.get_close_matches(name, self.names, n=1)
            raise RunError(
                f"{self.path} holds no tensor {name!r}",
                hint=f"the nearest it holds is {nearest[0]!r}" if nearest else None,
            )
        return self.manifest.pieces[name]

    def _check_length(self, name: str) -> Path:
        file = self.path / name
        try:
            length = file.stat().st_size
        except OSError as error:
            raise _damaged(file, error.strerror or str(error)) from error
        if length != self.manifest.files[name]:
            raise _damaged(file, f"it has {length} bytes of {self.manifest.files[name]}")
        return file

    def _piece(self, entry: Entry) -> Tensor:
        # Mapped anew for each piece: what a mapping has touched counts as this process's memory
        # until it is gone. The length comes first: to read past a mapped file's end kills.
        file = self._check_length(entry.file)
        try:
            with safe_open(file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(entry.key)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, str(error)) from error
        expected = tensor_file.DTYPES[entry.dtype][0]
        if tensor.dtype != expected or tuple(tensor.shape) != entry.shape:
            raise _damaged(
                file,
                f"{entry.key} is {tensor.dtype} {tuple(tensor.shape)}, and the manifest says "
                f"{expected} {entry.shape}",
            )
        if (entry.file, entry.key) not in self._checked:
            if tensor_file.checksum(tensor) != entry.checksum:
                raise _damaged(file, f"the checksum of {entry.key} is not that of what was saved")
            self._checked.add((entry.file, entry.key))
        return tensor


def newest_valid(
    checkpoints: Path, on_damaged: Callable[[CheckpointDamaged], None]
) -> Checkpoint | None:
    """The newest checkpoint that verifies; None where none was ever finished.

    Each that is damaged or half-written is given to `on_damaged`, and the one before it is tried.
    Raises `CheckpointDamaged` that lists them all where there are some and none verifies.
    """
    for path in folder.half_written(checkpoints):
        on_damaged(CheckpointDamaged(f"{path} is half-written: its save never ended"))
    found = []
    for path in reversed(folder.checkpoints(checkpoints).values()):
        try:
            checkpoint = Checkpoint.open(path)
            checkpoint.verify()
        except CheckpointDamaged as error:
            found.append(error.message)
            on_damaged(error)
        else:
            return checkpoint
    if not found:
        return None
    raise CheckpointDamaged(
        f"every checkpoint in {checkpoints} is damaged:\n" + "\n".join(found),
        hint="restore one of them from a copy, or start a new run",
    )


def _damaged(file: Path, what: str) -> CheckpointDamaged:
    return CheckpointDamaged(f"{file} is damaged: {what}")
