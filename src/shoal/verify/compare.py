"""Every rank's record beside one device's: rank 0 has the latter and shows it to the others."""

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.errors import RunError
from shoal.layout import Layout
from shoal.verify.certificate import STAGES, Difference
from shoal.verify.measure import errors
from shoal.verify.record import Record, rows_of

_NOT_CUT = ("loss", "gradient_norm")


def share_record(group: Group, record: Record | None, source: int = 0) -> Record:
    """The record of the rank `source`, on every rank; the others give None or theirs. Collective.

    What is not contiguous arrives so.
    """
    mine = record if group.rank == source else None
    listing = None if mine is None else _listing(mine)
    said = group.all_gather_json(listing, "evaluation")[source]
    shared = Record(count=said["count"], allowed=said["allowed"])
    for kind, tensors in said["tensors"].items():
        shared.tensors[kind] = {}
        for name, dtype, shape in tensors:
            here = (
                mine.tensors[kind][name].detach().clone().contiguous()
                if mine is not None
                else torch.empty(shape, dtype=getattr(torch, dtype))
            )
            shared.tensors[kind][name] = group.broadcast(here, source, "evaluation")
    return shared


def _listing(record: Record) -> dict[str, Any]:
    return {
        "count": record.count,
        "allowed": record.allowed,
        "tensors": {
            kind: [
                [name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in of.items()
            ]
            for kind, of in record.tensors.items()
        },
    }


@dataclass(frozen=True)
class Held:
    """What one rank has of the whole: rows of the batch, parts of parameters and of their state.

    ``share``: its replica's (start, stop) of the global batch; ``outputs``: whether it is one of
    the ranks that have the model's outputs.
    """

    layout: Layout
    share: tuple[int, int]
    batch_examples: int
    outputs: bool = True

    def of(self, kind: str, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of the reference's tensors of one kind."""
        if kind in _NOT_CUT:
            return whole
        if kind == "output":
            rows = self.share, self.batch_examples
            return {name: rows_of(each, *rows) for name, each in whole.items() if self.outputs}
        taken = {}
        for name, tensor in whole.items():
            part = self.layout.get(name.rpartition("/")[0] if kind == "optimizer" else name)
            if part is not None:
                cut = tensor.dim() > 0 and tuple(tensor.shape) == part.global_shape
                taken[name] = part.take(tensor) if cut and not part.is_whole else tensor
        return taken


def require_all_held(group: Group, layout: Layout, reference: Record) -> None:
    """Raise `RunError` if a tensor of the reference is on no rank. Collective."""
    held = {name for names in group.all_gather_json(sorted(layout), "evaluation") for name in names}
    for kind in ("parameter", "buffer"):
        for name in reference.tensors[kind]:
            if name not in held:
                raise RunError(f"{kind} {name} is on no rank: the strategy has lost it")


@dataclass
class Comparison:
    """The errors of all steps so far, on one rank."""

    max_error: dict[str, float] = field(default_factory=dict)
    first: Difference | None = None
    of_allowed: float = 0.0

    def lose(self, step: int) -> None:
        """Note that the ranks came to no number at `step`, where one device did."""
        self.max_error["loss"] = float("inf")
        self.first = self.first or Difference("loss", "loss", step, float("inf"))

    def add(self, step: int, mine: Record, reference: Record, held: Held) -> None:
        """Compare one step's record with what `held` says that this rank has of the reference."""
        for kind in STAGES:
            theirs = reference.tensors[kind]
            found = errors(mine.tensors[kind], held.of(kind, theirs), whole=theirs)
            for name, error in found.items():
                self.max_error[kind] = max(self.max_error.get(kind, 0.0), error)
                allowed = reference.allowance(kind, name)
                if allowed:
                    self.of_allowed = max(self.of_allowed, error / allowed)
                if error > allowed and self.first is None:
                    self.first = Difference(name, kind, step, error)


def first_of_all(group: Group, comparison: Comparison) -> Difference | None:
    """The first difference on any rank: the earliest step, then what is computed first.

    Nothing where ranks hold pieces. Collective; equal on all ranks.
    """
    own = comparison.first.to_json() if comparison.first is not None else None
    found = [each for each in group.all_gather_json(own, "evaluation") if each is not None]
    return Difference(**min(found, key=_when)) if found else None


def _when(difference: dict[str, Any]) -> tuple[int, int, str]:
    place = STAGES.index(difference["kind"]) if difference["kind"] in STAGES else len(STAGES)
    return difference["step"], place, json.dumps(difference["name"])
