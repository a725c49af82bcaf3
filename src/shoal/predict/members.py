"""The models of some runs: of a solo run each member, of any other run the one model it made.

solo run       replica-0/ replica-1/ …      a member each
local, …       replica-0/ replica-1/ …      one: their mean
any other                                   one

found = members_of([run], skip_damaged=False)
found.members[0].model(workload)            # an nn.Module with its weights
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.checkpoint import Checkpoint, newest_valid, replicas
from shoal.errors import CheckpointDamaged, RunFolderError, UsageError
from shoal.job import Workload
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Solo


@dataclass(frozen=True)
class Member:
    """One trained model on disk. ``replica``: its number in a run of several, None for all."""

    name: str
    run: str
    checkpoint: str
    replica: int | None = None
    weights: str | None = None  # a file with other weights for it: what was merged

    @cached_property
    def recipe(self) -> Recipe:
        # Members of one run may be unlike.
        return Run.open(Path(self.run)).recipe.member(self.replica or 0)

    @property
    def solo(self) -> bool:
        """Whether a tenth of the training data was held back from it."""
        return self.replica is not None

    def saved(self) -> Checkpoint:
        """Its weights, as a checkpoint of one model."""
        whole = Checkpoint.open(Path(self.checkpoint))
        if self.replica is not None:
            return replicas.one_of(whole, self.replica)
        return replicas.Mean.of(whole) if replicas.count(whole) else whole

    def model(self, workload: Workload) -> nn.Module:
        """The model in evaluation mode, whole, on the CPU. Raises `CheckpointDamaged`."""
        model = workload.first_model(torch.float32)
        if self.weights is not None:
            from safetensors.torch import load_file

            model.load_state_dict(load_file(self.weights))
            return model.eval()
        saved = self.saved()
        with torch.no_grad():
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(saved.read(name))
        return model.eval()

    def check(self) -> None:
        """Read everything that it needs. Raises `CheckpointDamaged`."""
        saved = self.saved()
        for name in saved.weights:
            saved.read(name)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "run": self.run,
            "checkpoint": self.checkpoint,
            "replica": self.replica,
            "weights": self.weights,
        }


@dataclass
class Found:
    """The members that can be used, and what the user should know of the others."""

    members: list[Member] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def members_of(runs: Sequence[Run], *, skip_damaged: bool) -> Found:
    """Every member of `runs`, in order; each one's weights have been read once.

    Raises `RunFolderError` for a run without checkpoints, `CheckpointDamaged` naming a member that
    cannot be read, unless it is to be skipped.
    """
    found = Found()
    for run in runs:
        if not any(run.checkpoints_path.glob("step-*")):
            raise RunFolderError(
                f"{run.path} has no checkpoint yet",
                hint="A run writes one at its end, or when it is stopped, and as often as the "
                "recipe's checkpoint.every says.",
            )
        if isinstance(run.strategy.agreement, Solo):
            _add_members(run, found, skip_damaged)
        else:
            _add_one(run, found, skip_damaged)
    if not found.members:
        raise UsageError("no model is left: every one is damaged")
    return found


def _add_one(run: Run, found: Found, skip_damaged: bool) -> None:
    damaged: list[CheckpointDamaged] = []
    try:
        newest = newest_valid(run.checkpoints_path, damaged.append)
    except CheckpointDamaged as error:
        _skip(run.name, error, found, skip_damaged)
        return
    found.notes += [f"{error.message}; the one before it is used" for error in damaged]
    assert newest is not None  # there is one
    found.members.append(Member(run.name, str(run.path), str(newest.path)))


def _add_members(run: Run, found: Found, skip_damaged: bool) -> None:
    """Members one by one: where one is damaged, the others of that checkpoint are not."""
    newest = _newest(run)
    for number in range(replicas.count(newest)):
        name = f"{run.name}/{number}"
        member = Member(name, str(run.path), str(newest.path), number)
        try:
            member.check()
        except CheckpointDamaged as error:
            _skip(name, error, found, skip_damaged)
        else:
            found.members.append(member)


def _newest(run: Run) -> Checkpoint:
    """The newest checkpoint whose manifest is whole."""
    first: CheckpointDamaged | None = None
    for path in sorted(run.checkpoints_path.glob("step-*"), reverse=True):
        try:
            return Checkpoint.open(path)
        except CheckpointDamaged as error:
            first = first or error
    assert first is not None
    raise first


def _skip(name: str, error: CheckpointDamaged, found: Found, skip_damaged: bool) -> None:
    if not skip_damaged:
        raise CheckpointDamaged(
            f"member {name} is damaged: {error.message}",
            hint="Restore it from a copy, or go on with the others: --skip-damaged.",
        ) from error
    found.notes.append(f"member {name} is left out, as it is damaged: {error.message}")
