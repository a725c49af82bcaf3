"""Plain weights for other programs: one safetensors file of parameters and buffers.

    manifest + pieces  ->  {name: whole tensor, alias: the same tensor again}

What was cut is put together again; optimizer state stays behind.

    export(Checkpoint.open(path), Path("model.safetensors"))     # torch's load_state_dict takes it
"""

import os
from dataclasses import dataclass
from pathlib import Path

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
    specs = [
        tensor_file.Spec(
            name, str(checkpoint.dtype(name)).removeprefix("torch."), checkpoint.shape(name)
        )
        for name in names
    ]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = tensor_file.write(temporary, specs, checkpoint.read)
        temporary.replace(path)
        files.sync_folder(path.parent)
    except OSError as error:
        needed = sum(spec.bytes for spec in specs)
        raise files.write_failure(
            error, path.name, path.parent, needed=needed, free=None
        ) from error
    return Exported(path, len(names), size)
