"""The names in a folder of checkpoints, and how they change so that a crash costs nothing.

    step-000000400          a checkpoint
    .step-000000400.tmp     being written
    .step-000000400.old     the one of the same step that is being replaced; counts until it is
    .step-000000400.gone    being removed

One process writes to such a folder (rank 0 of the run that holds the run folder's lock); others
may read at any time.

    list_checkpoints(folder)                   # (300, 400)
    prune(folder, keep=3, also={120})          # the newest three and step 120 stay
"""

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from shoal.checkpoint import files

_NAME = re.compile(r"step-([0-9]{9,})")
_HIDDEN = re.compile(r"\.step-([0-9]{9,})\.(tmp|old|gone)")


def final_path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:09d}"


def hidden_path(folder: Path, step: int, kind: str) -> Path:
    return folder / f".step-{step:09d}.{kind}"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Steps in rising order and where each is; empty where there is no folder.

    A checkpoint that was moved aside by a save that never ended is found under its hidden name.
    """
    found = {step: hidden_path(folder, step, "old") for step in _hidden(folder, "old")}
    for name in _names(folder):
        if match := _NAME.fullmatch(name):
            found[int(match[1])] = folder / name
    return dict(sorted(found.items()))


def list_checkpoints(folder: Path) -> tuple[int, ...]:
    """The steps that have a checkpoint, whether or not it is damaged, in rising order."""
    return tuple(checkpoints(folder))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of this step is, or would be."""
    return checkpoints(folder).get(step, final_path(folder, step))


def half_written(folder: Path) -> list[Path]:
    """What a save that was killed has left, newest first."""
    steps = sorted(_hidden(folder, "tmp"), reverse=True)
    return [hidden_path(folder, step, "tmp") for step in steps]


def tidy(folder: Path) -> None:
    """Finish or undo what a killed process had begun. Only the run's one writer may call this."""
    for kind in ("tmp", "gone"):
        for step in _hidden(folder, kind):
            shutil.rmtree(hidden_path(folder, step, kind))
    for step in _hidden(folder, "old"):
        aside, final = hidden_path(folder, step, "old"), final_path(folder, step)
        if final.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(final)


def commit(folder: Path, step: int) -> Path:
    """Give the finished temporary folder its name, replacing an older one of the same step."""
    final, aside = final_path(folder, step), hidden_path(folder, step, "old")
    replaces = final.exists()
    if replaces:
        final.rename(aside)
    hidden_path(folder, step, "tmp").rename(final)
    files.sync_folder(folder)
    if replaces:
        shutil.rmtree(aside, ignore_errors=True)  # committed: the next save tidies what is left
    return final


def prune(folder: Path, keep: int, also: Collection[int] = ()) -> tuple[int, ...]:
    """Remove all but the newest `keep` and the steps in `also`; return the steps removed."""
    if keep < 1:
        raise ValueError(f"at least one checkpoint must be kept, given {keep}")
    removed = [step for step in list_checkpoints(folder)[:-keep] if step not in also]
    return _remove(folder, removed)


def discard_after(folder: Path, step: int) -> tuple[int, ...]:
    """Remove checkpoints of later steps; return those steps.

    A run that goes on from `step`, because later ones are damaged, will make them anew; left where
    they are, they would count as the newest.
    """
    return _remove(folder, [later for later in list_checkpoints(folder) if later > step])


def _remove(folder: Path, steps: Collection[int]) -> tuple[int, ...]:
    for step in steps:
        gone = hidden_path(folder, step, "gone")
        checkpoint_path(folder, step).rename(gone)  # never half a checkpoint under its own name
        shutil.rmtree(gone)
    return tuple(steps)


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _hidden(folder: Path, kind: str) -> list[int]:
    matches = (_HIDDEN.fullmatch(name) for name in _names(folder))
    return [int(match[1]) for match in matches if match and match[2] == kind]
