"""Checkpoints of replicas that differ: each under a prefix of its own, read as if it were alone.

replica-0/fc.weight   replica-0/fc.weight/exp_avg   replica-1/fc.weight   …

count(checkpoint)                    # 2; 0 where there is one set of weights
one_of(checkpoint, 1)                # a checkpoint with `fc.weight`, `fc.weight/exp_avg`
Mean.of(checkpoint)                  # likewise, each tensor the mean over the replicas
"""

from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint.manifest import Manifest
from shoal.checkpoint.reading import Checkpoint
from shoal.errors import RunError
from shoal.layout import Slice

CENTRE = "sync.center"


def prefix(number: int) -> str:
    """What stands before the names of a replica's tensors."""
    return f"replica-{number}/"


def count(checkpoint: Checkpoint) -> int:
    """How many replicas with weights of their own it holds; 0 for one set of weights."""
    said = checkpoint.manifest.sync
    return int(said["replicas"]) if isinstance(said, dict) and "replicas" in said else 0


def one_of(checkpoint: Checkpoint, number: int) -> Checkpoint:
    """The replica `number` as a checkpoint of its own, of the same files. Raises `RunError`."""
    if not 0 <= number < count(checkpoint):
        raise RunError(
            f"{checkpoint.path} has no replica {number}: there are {count(checkpoint)} of them"
        )
    start, whole = prefix(number), checkpoint.manifest
    tensors = tuple(
        entry.model_copy(update={"name": entry.name.removeprefix(start)})
        for entry in whole.tensors
        if entry.name.startswith(start)
    )
    aliases = {
        alias.removeprefix(start): name.removeprefix(start)
        for alias, name in whole.aliases.items()
        if alias.startswith(start)
    }
    own: dict[str, Any] = {"tensors": tensors, "aliases": aliases, "sync": None}
    own["optimizer"] = (whole.optimizer or {}).get(start.rstrip("/"))
    # Not `model_copy`: what the copy has worked out once would be the whole's.
    values = {name: getattr(whole, name) for name in Manifest.model_fields} | own
    return Checkpoint(checkpoint.path, Manifest.model_construct(**values))


class Mean(Checkpoint):
    """The mean of several checkpoints of one shape, in float64; whole numbers are the first's."""

    def __init__(self, parts: list[Checkpoint]) -> None:
        super().__init__(parts[0].path, parts[0].manifest)
        self._parts = parts

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Mean":
        """Over all replicas of a checkpoint."""
        return cls([one_of(checkpoint, number) for number in range(count(checkpoint))])

    def read(self, name: str, part: Slice | None = None) -> Tensor:
        """As `Checkpoint.read`. An optimizer's state that some replica lacks is the others'."""
        if not self.dtype(name).is_floating_point:
            return self._parts[0].read(name, part)
        centre = f"{name}/{CENTRE}"
        if centre in self._parts[0]:  # the same on all: what stands for elastic replicas
            return self._parts[0].read(centre, part)
        read = [each.read(name, part) for each in self._parts if name in each]
        total = torch.zeros(read[0].shape, dtype=torch.float64)
        for tensor in read:
            total += tensor
        return (total / len(read)).to(read[0].dtype)
