"""A checkpoint moved across layouts, both ways.

    ranks ── save ──> checkpoint ── load ──> one device     bit for bit what the ranks held,
                                                            and close to the reference
    one device ── save ──> checkpoint ── load ──> ranks     each has its pieces, bit for bit

The run's own code saves and loads.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint import Alone, Checkpoint, save
from shoal.comm import Group, Groups
from shoal.errors import ShoalError
from shoal.job import Execution, Job, assemble
from shoal.layout import Part
from shoal.train.commit import GroupMeeting
from shoal.train.snapshot import snapshot_of
from shoal.verify.certificate import Difference, Moved
from shoal.verify.compare import Held, share_record
from shoal.verify.measure import errors
from shoal.verify.record import Record, state_after
from shoal.verify.reference import Reference

_KINDS = ("parameter", "buffer", "optimizer")


@dataclass(frozen=True)
class Finding:
    """What came of the move; ``first`` and ``cause`` where it is not as it should be."""

    moved: Moved
    first: Difference | None = None
    cause: str | None = None


@dataclass(frozen=True)
class Move:
    """One rank's part. ``reference`` is on rank 0 alone: one device, in the ranks' precision."""

    job: Job
    execution: Execution
    held: Held
    steps: int
    strategy: str
    reference: Reference | None
    folder: str | None = None  # None: one of its own

    def check(self, right: Record) -> Finding:
        """Move a checkpoint both ways; ``right``: one device's last step. Collective."""
        world = self.job.groups.world
        made = self.folder
        if made is None and world.rank == 0:
            made = tempfile.mkdtemp(prefix="shoal-verify-")
        folder = Path(world.all_gather_json(made, "evaluation")[0])
        try:
            return self._both_ways(folder, right)
        except ShoalError as error:  # the save says the same on all ranks
            return _lost("a checkpoint", self.steps, error.message)
        finally:
            world.all_gather_json(None, "evaluation")
            if world.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def _both_ways(self, folder: Path, right: Record) -> Finding:
        job, world = self.job, self.job.groups.world
        snapshot = snapshot_of(job, self.steps, "", self.strategy)
        saved = save(folder / "ranks", snapshot, GroupMeeting(job.groups.checkpoint))
        loaded = _on_rank_0(world, lambda: self._load_alone(saved.path))
        mine = _state(job)
        out = _bits(mine, loaded, self.held)
        one = _on_rank_0(world, lambda: self._save_alone(folder / "one"))
        state = Checkpoint.open(folder / "one" / saved.path.name)
        restored = assemble(job.groups, job.workload, self.execution, state)
        back = _bits(_state(restored), one, self.held)
        return self._finding(world, (out, back), (mine, loaded, _state(restored), one), right)

    def _load_alone(self, path: Path) -> Record:
        """The ranks' checkpoint, in one device's model and optimizer."""
        return _state(self._alone(Checkpoint.open(path)))

    def _save_alone(self, folder: Path) -> Record:
        """Save one device's own state as a checkpoint of one device."""
        assert self.reference is not None
        job = self._alone(None)
        job.replica.model.load_state_dict(self.reference.model.state_dict())
        job.optimizer.load_state_dict(self.reference.optimizer.state_dict())
        save(folder, snapshot_of(job, self.steps, "", "single"), Alone())
        return _state(job)

    def _alone(self, state: Checkpoint | None) -> Job:
        plain = Execution(bf16=self.execution.bf16, dtype=self.execution.dtype)
        return assemble(Groups.alone(self.job.groups.device), self.job.workload, plain, state)

    def _finding(
        self,
        world: Group,
        wrong: tuple[tuple[str, str] | None, tuple[str, str] | None],
        records: tuple[Record, Record, Record, Record],
        right: Record,
    ) -> Finding:
        mine, loaded, restored, one = records
        error = 0.0
        for kind in _KINDS:
            found = errors(loaded.tensors[kind], right.tensors[kind])
            error = max([error, *found.values()])
        said: list[Any] = [None, None]
        for place, (differs, here, whole) in enumerate(
            zip(wrong, (mine, restored), (loaded, one), strict=True)
        ):
            if differs is not None:
                kind, name = differs
                said[place] = [kind, name, _how(here, whole, self.held, kind, name)]
        everywhere = world.all_gather_json(said, "evaluation")
        ways = (
            f"a checkpoint of {self.strategy}, loaded into one device",
            f"a checkpoint of one device, restored under {self.strategy}",
        )
        for place, way in enumerate(ways):
            for rank, each in enumerate(everywhere):
                if each[place] is not None:
                    kind, name, how = each[place]
                    cause = f"{way}, has another {kind} {name} than rank {rank}{how}"
                    first = Difference(name, "checkpoint", self.steps - 1, float("inf"))
                    return Finding(Moved(error, False), first, cause)
        return Finding(Moved(error, True))


def _lost(what: str, steps: int, why: str) -> Finding:
    first = Difference(what, "checkpoint", steps - 1, float("inf"))
    return Finding(
        Moved(float("inf"), False), first, f"{what} cannot be moved across layouts: {why}"
    )


def _state(job: Job) -> Record:
    record = Record()
    record.tensors |= state_after(job.replica.holding, job.optimizer)
    return record


def _on_rank_0(world: Group, work: Callable[[], Record]) -> Record:
    """Rank 0's record, on all ranks, or its error on all. Collective."""
    record, failed = None, None
    if world.rank == 0:
        try:
            record = work()
        except ShoalError as error:
            failed = error.to_json()
    said: Any = world.all_gather_json(failed, "evaluation")[0]
    if said is not None:
        raise ShoalError.from_json(said)
    return share_record(world, record)


def _bits(mine: Record, whole: Record, held: Held) -> tuple[str, str] | None:
    """Kind and name of the first tensor whose bits are not this rank's part of `whole`."""
    for kind in _KINDS:
        theirs = held.of(kind, whole.tensors[kind])
        for name in dict.fromkeys([*theirs, *mine.tensors[kind]]):
            here, there = mine.tensors[kind].get(name), theirs.get(name)
            if here is None or there is None or not _same_bits(here, there):
                return kind, name
    return None


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _how(mine: Record, whole: Record, held: Held, kind: str, name: str) -> str:
    """In what way it is another: as found among what there is."""
    here = mine.tensors[kind].get(name)
    right = whole.tensors[kind].get(name)
    if here is None:
        return ": the rank has none"
    if right is None:
        return ": it is not in the checkpoint"
    if not bool(here.any()) or not bool(right.any()):
        return ": it is zero on one side, so it was not restored"
    for other, tensor in whole.tensors[kind].items():
        part = held.of(kind, {other: tensor}).get(other)
        if other != name and part is not None and _same_bits(here, part):
            return f": it is that of {other}"
    if sorted(here.flatten().tolist()) == sorted(
        held.of(kind, {name: right})[name].flatten().tolist()
    ):
        return ": its elements are there in another order"
    whole_part = Part.whole(tuple(right.shape))
    if here.numel() < whole_part.numel and _is_another_piece(here, right):
        return ": the pieces are in the wrong order, it is another rank's piece"
    return ""


def _is_another_piece(here: Tensor, whole: Tensor) -> bool:
    """Whether a piece lies in the whole tensor at another place along one of its dimensions."""
    for dim in range(whole.dim()):
        size = here.shape[dim]
        for start in range(whole.shape[dim] - size + 1):
            piece = whole.narrow(dim, start, size)
            if piece.shape == here.shape and torch.equal(piece, here):
                return True
    return False
