"""A finished run as plain weights, for programs that know nothing of Shoal.

runs/digits-0007/checkpoints/step-…/   ->   model.safetensors     qualified name: whole tensor

exported = export("runs/digits-0007", "model.safetensors")
model.load_state_dict(safetensors.torch.load_file(exported.path))     # the user's own module
"""

from pathlib import Path

from shoal import checkpoint
from shoal.checkpoint import Exported
from shoal.errors import CheckpointDamaged, RunFolderError, UsageError
from shoal.run import Run


def export(run: Run | Path | str, path: Path | str) -> Exported:
    """Write the weights and buffers of a run's newest checkpoint to one safetensors file.

    They are whole, under the names of the user's module, whatever the run's strategy was; tied ones
    under each of their names. An existing file is replaced at the end or not at all. Raises
    `RunFolderError` for what is no run or has no checkpoint, `CheckpointDamaged` where none
    verifies, `UsageError` for a path that cannot be a file, `DiskFull` or `RunError` where it
    cannot be written.
    """
    target = Path(path)
    if target.is_dir() or target.name in ("", ".", ".."):
        raise UsageError(
            f"{target} is a folder, and weights go into one file",
            hint="Give a file, as in --out model.safetensors.",
        )
    folder = run.path if isinstance(run, Run) else Path(run)
    opened = run if isinstance(run, Run) else Run.open(folder)
    damaged: list[CheckpointDamaged] = []
    newest = checkpoint.newest_valid(opened.checkpoints_path, damaged.append)
    if newest is None:
        said = f": {damaged[0].message}" if damaged else ""
        raise RunFolderError(
            f"{folder} has no checkpoint yet{said}",
            hint="A run writes one at its end, or when it is stopped, and as often as the "
            "recipe's checkpoint.every says.",
        )
    return checkpoint.export(newest, target)
