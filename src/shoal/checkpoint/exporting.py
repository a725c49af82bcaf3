"""Plain weights for other programs: one safetensors file of parameters and buffers.

    manifest + pieces  ->  {name: whole tensor, alias: the same tensor again}

What was cut is put together again; optimizer state stays behind.

    export(Checkpoint.open(path), Path("model.safetensors"))     # torch's load_state_dict takes it
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from shoal.checkpoint import files, tensor_file
from shoal.checkpoint.reading import Checkpoint


@dataclass(frozen=True)
class Exported:
    """The file, the tensors in it, and its bytes."""

    path: Path
    tensors: int
    bytes: int


def export(checkpoint: Checkpoint, path: Path) -> Exported:
    """Write parameters and buffers under their qualified names, whole; tied ones under each name.

    Atomic: the file is replaced at the end or not at all. One tensor is in memory at a time.
    Raises `DiskFull` or `RunError` where it cannot be written, `CheckpointDamaged` where a piece
    is not what was saved.
    """
    names = [*checkpoint.weights, *checkpoint.manifest.aliases]
    specs = [_spec(name, checkpoint.dtype(name), checkpoint.shape(name)) for name in names]
    return _write(specs, checkpoint.read, path)


def export_state(state: Mapping[str, Tensor], path: Path) -> Exported:
    """Write a module's `state_dict`; as `export`."""
    specs = [_spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
    return _write(specs, lambda name: state[name].contiguous(), path)


def _spec(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> tensor_file.Spec:
    return tensor_file.Spec(name, str(dtype).removeprefix("torch."), shape)


def _write(
    specs: Sequence[tensor_file.Spec], read: Callable[[str], Tensor], path: Path
) -> Exported:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = tensor_file.write(temporary, specs, read)
        temporary.replace(path)
        files.sync_folder(path.parent)
    except OSError as error:
        needed = sum(spec.bytes for spec in specs)
        raise files.write_failure(
            error, path.name, path.parent, needed=needed, free=None
        ) from error
    return Exported(path, len(specs), size)
