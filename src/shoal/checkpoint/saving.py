"""Saving: every rank writes its pieces, rank 0 checks and commits, and all succeed or all fail.

    every rank   hash pieces ── meet ── write own file, sync ── meet ──                    ── meet
    rank 0       make folder ──┘                               └── manifest, sync, rename ──┘

A piece that several ranks hold is written by the one that has least to write. Whatever goes wrong
on one rank is said at the next meeting and raised on all; earlier checkpoints are not touched.

    saved = save(run.checkpoints_path, snapshot, meeting)      # .path .bytes .seconds
"""

import contextlib
import json
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.checkpoint import files, folder, tensor_file
from shoal.checkpoint.manifest import FILE_NAME, FORMAT, Manifest
from shoal.checkpoint.meeting import Meeting
from shoal.checkpoint.plan import Offer, Plan, make_plan
from shoal.checkpoint.snapshot import Snapshot
from shoal.errors import RanksDiffer, RunError, ShoalError
from shoal.layout import Slice
from shoal.version import __version__


@dataclass(frozen=True)
class SavedCheckpoint:
    """Where it is, the bytes of all its files, and the seconds it took on this rank."""

    path: Path
    bytes: int
    seconds: float


def save(
    checkpoints: Path,
    snapshot: Snapshot,
    meeting: Meeting,
    afterwards: Callable[[], object] = lambda: None,
) -> SavedCheckpoint:
    """Save every rank's snapshot as one checkpoint; an older one of that step is replaced.

    ``afterwards``: what rank 0 does once the checkpoint has its name, before the last meeting; if
    it fails, all ranks raise that too, though the checkpoint is there.

    Every rank of the meeting calls this and all of them return, or raise the same error:
    `DiskFull`, `ReplicasDiffer` (a piece that is not the same on two ranks that hold it),
    `RanksDiffer` (snapshots of different steps), `RunError` (anything else that went wrong).
    """
    started = time.perf_counter()
    saving = _Saving(checkpoints, snapshot, meeting)
    try:
        said = saving.together(saving.prepare)
        plan = saving.agree(said)
        sizes = saving.together(lambda: saving.write(plan))
        total = saving.together(lambda: saving.commit(plan, sizes, afterwards))[0]
    except ShoalError:
        if meeting.rank == 0:
            with contextlib.suppress(OSError):  # the next save tidies again, and the cause is known
                folder.tidy(checkpoints)
        raise
    path = folder.final_path(checkpoints, snapshot.step)
    return SavedCheckpoint(path, total, time.perf_counter() - started)


class _Saving:
    """One rank's part of one save."""

    def __init__(self, checkpoints: Path, snapshot: Snapshot, meeting: Meeting) -> None:
        self.checkpoints = checkpoints
        self.snapshot = snapshot
        self.meeting = meeting
        self.temporary = folder.hidden_path(checkpoints, snapshot.step, "tmp")
        self.needed: int | None = None
        self.free: int | None = None

    def prepare(self) -> dict[str, Any]:
        """What this rank holds; rank 0 also makes the folder."""
        if self.meeting.rank == 0:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            folder.tidy(self.checkpoints)
            self.temporary.mkdir()
            self.free = shutil.disk_usage(self.checkpoints).free
        offers = [
            _offer(name, box, tensor)
            for name, piece in self.snapshot.tensors.items()
            for box, tensor in piece.boxes()
        ]
        return {
            "common": json.loads(json.dumps(self.snapshot.common, allow_nan=False)),
            "offers": [offer.to_json() for offer in offers],
            "aliases": dict(self.snapshot.aliases),
            "free": self.free,
        }

    def agree(self, said: list[dict[str, Any]]) -> Plan:
        """The plan, made alike on every rank from the same words: no meeting is needed."""
        for rank, words in enumerate(said):
            for item, value in words["common"].items():
                expected = said[0]["common"][item]
                if value != expected:
                    raise RanksDiffer(
                        f"a checkpoint cannot be saved: {item} is {value!r} on rank {rank} and "
                        f"{expected!r} on rank 0",
                        rank=rank,
                        phase="checkpoint",
                    )
        plan = make_plan([[Offer.from_json(o) for o in words["offers"]] for words in said])
        aliases = {alias: name for words in said for alias, name in words["aliases"].items()}
        self.needed, self.free = plan.bytes, said[0]["free"]
        return Plan(plan.entries, plan.bytes, aliases)

    def write(self, plan: Plan) -> int:
        """Write this rank's file; 0 bytes where the plan gives it nothing to write."""
        entries = plan.of_rank(self.meeting.rank)
        if not entries:
            return 0
        held = {
            (name, box): tensor
            for name in {entry.name for entry in entries}
            for box, tensor in self.snapshot.tensors[name].boxes()
        }
        tensors = {entry.key: held[entry.name, entry.slice] for entry in entries}
        specs = [tensor_file.Spec(entry.key, entry.dtype, entry.shape) for entry in entries]
        return tensor_file.write(self.temporary / entries[0].file, specs, tensors.__getitem__)

    def commit(self, plan: Plan, sizes: list[int], afterwards: Callable[[], object]) -> int:
        """Rank 0: check that every file has arrived, write the manifest, give the folder its name.

        Returns the bytes of the checkpoint; other ranks do nothing and return 0.
        """
        if self.meeting.rank != 0:
            return 0
        names = {plan.file_of(rank): size for rank, size in enumerate(sizes) if size}
        self._check_arrived(names)
        snapshot = self.snapshot
        manifest = Manifest(
            format=FORMAT,
            shoal=__version__,
            step=snapshot.step,
            fingerprint=snapshot.fingerprint,
            strategy=snapshot.strategy,
            position=snapshot.position,
            sync=snapshot.sync,
            train=snapshot.train,
            optimizer=snapshot.optimizer,
            aliases=dict(plan.aliases),
            files=names,
            tensors=plan.entries,
        ).dump()
        files.write(self.temporary / FILE_NAME, [memoryview(manifest)])
        files.sync_folder(self.temporary)
        folder.commit(self.checkpoints, snapshot.step)
        afterwards()
        return sum(sizes) + len(manifest)

    def _check_arrived(self, sizes: dict[str, int]) -> None:
        for name, size in sizes.items():
            path = self.temporary / name
            if not path.exists() or path.stat().st_size != size:
                raise RunError(
                    f"{name}, which another rank wrote to {self.checkpoints}, is not there for "
                    "rank 0",
                    hint="give a folder that all hosts share with --out",
                )

    def together(self, work: Callable[[], Any]) -> list[Any]:
        """Do this rank's work, meet, and return every rank's result or raise the first error."""
        value, cause = None, None
        try:
            value = work()
        except Exception as error:  # said at the meeting: whoever is silent leaves others waiting
            cause = error
        failure = None if cause is None else self._explain(cause).to_json()
        said = self.meeting.all_gather_json({"value": value, "error": failure})
        for words in said:
            if words["error"] is not None:
                raise ShoalError.from_json(words["error"]) from cause
        return [words["value"] for words in said]

    def _explain(self, error: Exception) -> ShoalError:
        what = f"the checkpoint of step {self.snapshot.step}"
        if isinstance(error, ShoalError):
            explained = error
        elif isinstance(error, OSError):
            explained = files.write_failure(
                error, what, self.checkpoints, needed=self.needed, free=self.free
            )
        else:
            explained = RunError(f"{what} could not be saved: {error}")
            explained.traceback = "".join(traceback.format_exception(error))
        return explained.located(
            rank=self.meeting.rank, step=self.snapshot.step, phase="checkpoint"
        )


def _offer(name: str, box: Slice, tensor: Tensor) -> Offer:
    dtype = tensor_file.dtype_name(name, tensor)
    return Offer(name, dtype, box, tensor_file.checksum(tensor))
