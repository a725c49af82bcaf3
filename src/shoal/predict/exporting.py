"""A finished run as plain weights, for programs that know nothing of Shoal.

runs/digits-0007/checkpoints/step-…/   ->   model.safetensors     qualified name: whole tensor

exported = export("runs/digits-0007", "model.safetensors")
model.load_state_dict(safetensors.torch.load_file(exported.path))     # the user's own module
"""

from pathlib import Path

from shoal import checkpoint
from shoal.checkpoint import Checkpoint, Exported, replicas
from shoal.errors import CheckpointDamaged, RunFolderError, UsageError
from shoal.run import Run
from shoal.strategy import Solo


def export(run: Run | Path | str, path: Path | str, how: str | None = None) -> Exported:
    """Write the weights and buffers of a run's newest checkpoint to one safetensors file.

    They are whole, under the names of the user's module, whatever the run's strategy was; tied ones
    under each of their names. Of replicas that met they are the mean; of models that were trained
    apart (solo) ``how`` says which: best, mean, greedy-soup or matched-mean, as in `predict`. An
    existing file is replaced at the end or not at all. Raises `RunFolderError` for what is no run
    or has no checkpoint, `CheckpointDamaged` where none verifies, `UsageError` for a path that
    cannot be a file and for a ``how`` that does not fit, `DiskFull` or `RunError` where it cannot
    be written.
    """
    target = Path(path)
    if target.is_dir() or target.name in ("", ".", ".."):
        raise UsageError(
            f"{target} is a folder, and weights go into one file",
            hint="Give a file, as in --out model.safetensors.",
        )
    opened = run if isinstance(run, Run) else Run.open(Path(run))
    newest = _newest(opened)
    if isinstance(opened.strategy.agreement, Solo):
        return _export_one(opened, target, how)
    if how is not None:
        raise UsageError(
            f"--how {how} is for runs of several models (solo), and {opened.path} has one",
            hint="Leave --how out.",
        )
    return checkpoint.export(replicas.Mean.of(newest) if replicas.count(newest) else newest, target)


def _newest(run: Run) -> Checkpoint:
    damaged: list[CheckpointDamaged] = []
    newest = checkpoint.newest_valid(run.checkpoints_path, damaged.append)
    if newest is None:
        said = f": {damaged[0].message}" if damaged else ""
        raise RunFolderError(
            f"{run.path} has no checkpoint yet{said}",
            hint="A run writes one at its end, or when it is stopped, and as often as the "
            "recipe's checkpoint.every says.",
        )
    return newest


def _export_one(run: Run, target: Path, how: str | None) -> Exported:
    """One model of several, or made of them."""
    from shoal.predict.bench import Bench
    from shoal.predict.choosing import check_how, make_one
    from shoal.predict.members import members_of

    members = members_of([run], skip_damaged=False).members
    if len(members) == 1 and how is None:
        return checkpoint.export(members[0].saved(), target)
    if how is None or how == "ensemble":
        raise UsageError(
            f"{run.path} has {len(members)} models, and one file holds one",
            hint="Say which: --how best, mean, greedy-soup or matched-mean.",
        )
    made = make_one(check_how(how, len(members)), Bench(members))
    if made.state is None:
        return checkpoint.export(members[made.used[0]].saved(), target)
    return checkpoint.export_state(made.state, target)
