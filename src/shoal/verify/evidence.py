"""What there is to find a cause in: every rank's record of the step that differs, on rank 0.

evidence = gather_evidence(groups, job, record, held)        # collective
evidence.fits("gradient", hypothesis)      # do all ranks have their parts of these tensors?
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.comm import Groups
from shoal.layout import Layout, layout_from_json, layout_to_json
from shoal.verify.certificate import Difference
from shoal.verify.compare import Held, share_record
from shoal.verify.measure import errors
from shoal.verify.record import Record
from shoal.verify.reference import Reference

FITS = 1e-6  # a hypothesis explains tensors that it gives to this relative error

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Seen:
    """What one rank had after the step: its record, what it holds, and where it stands."""

    record: Record
    held: Held
    rank: int
    place: dict[str, int]  # its rank in the groups pp, dp, tp

    @property
    def layout(self) -> Layout:
        return self.held.layout


@dataclass(frozen=True)
class Evidence:
    """One differing step: one device's record, and all ranks'."""

    reference: Reference
    first: Difference
    theirs: Record
    ranks: list[Seen]
    shares: tuple[tuple[int, int], ...]
    degrees: dict[str, int] = field(default_factory=dict)
    microbatches: int = 1

    @property
    def step(self) -> int:
        return self.first.step

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def limit(self, kind: str, name: str) -> float:
        return max(FITS, self.theirs.allowed.get(kind, {}).get(name, 0.0))

    def wrong(self, seen: Seen, kind: str) -> list[str]:
        """The names of what differs from one device on this rank."""
        theirs = self.theirs.tensors[kind]
        found = errors(seen.record.tensors[kind], seen.held.of(kind, theirs), whole=theirs)
        return [name for name, e in found.items() if e > self.theirs.allowance(kind, name)]

    def fits_rank(
        self, seen: Seen, kind: str, whole: Tensors, names: Iterable[str] | None = None
    ) -> bool:
        """Whether a rank has its part of these whole tensors (of those named, if any are)."""
        mine, given = seen.record.tensors[kind], whole
        if names is not None:
            chosen = set(names)
            mine = {name: each for name, each in mine.items() if name in chosen}
            given = {name: each for name, each in whole.items() if name in chosen}
        sized = {name: self.theirs.tensors[kind].get(name, each) for name, each in given.items()}
        found = errors(mine, seen.held.of(kind, given), whole=sized)
        return bool(found) and all(e <= self.limit(kind, name) for name, e in found.items())

    def fits(self, kind: str, whole: Tensors) -> bool:
        """Whether every rank has its part of these, and one device other tensors."""
        apart = errors(self.theirs.tensors[kind], whole)
        if all(e <= self.limit(kind, name) for name, e in apart.items()):
            return False
        holders = [seen for seen in self.ranks if seen.record.tensors[kind] or seen.held.outputs]
        return bool(holders) and all(self.fits_rank(seen, kind, whole) for seen in holders)

    def assembled(self, kind: str) -> Tensors:
        """The ranks' tensors put together, each element from the lowest rank that holds it.

        Only what has the reference's shape when put together; outputs by rows of the replicas.
        """
        whole: Tensors = {}
        for name, right in self.theirs.tensors[kind].items():
            result = torch.zeros_like(right)
            for seen in reversed(self.ranks):
                mine = seen.record.tensors[kind].get(name)
                if mine is not None:
                    _place(result, mine, name, kind, seen.held)
            whole[name] = result
        return whole


def _place(result: Tensor, mine: Tensor, name: str, kind: str, held: Held) -> None:
    """Write a rank's tensor where it belongs in the whole."""
    if kind == "output":
        start, stop = held.share
        each = result.shape[0] // held.batch_examples if held.batch_examples and result.dim() else 0
        if each and mine.shape == result[start * each : stop * each].shape:
            result[start * each : stop * each] = mine
        return
    part = held.layout.get(name.rpartition("/")[0] if kind == "optimizer" else name)
    if part is not None and part.shape == tuple(mine.shape) and mine.dim():
        for box, index in part.places():
            ranges = zip(box.offset, box.stop, strict=True)
            result[tuple(slice(a, b) for a, b in ranges)] = mine[index].to(result.dtype)
    elif mine.shape == result.shape:
        result.copy_(mine)


def gather_ranks(groups: Groups, record: Record, held: Held) -> list[Seen]:
    """Every rank's record and place, by rank. Collective over all ranks."""
    own: dict[str, Any] = {
        "layout": layout_to_json(held.layout),
        "share": held.share,
        "outputs": held.outputs,
        "place": {
            "pp": groups.pipeline.rank,
            "dp": groups.data.rank,
            "tp": groups.tensor.rank,
        },
    }
    seen = []
    for rank, said in enumerate(groups.world.all_gather_json(own, "evaluation")):
        theirs = Held(
            layout_from_json(said["layout"]),
            (said["share"][0], said["share"][1]),
            held.batch_examples,
            said["outputs"],
        )
        shared = share_record(groups.world, record, rank)
        seen.append(Seen(shared, theirs, rank, said["place"]))
    return seen
