"""Every rank's record beside one device's: rank 0 has the latter and shows it to the others."""

from dataclasses import dataclass

import torch

from shoal.comm import Group
from shoal.train.agree_start import digest
from shoal.verify.certificate import KINDS, TOLERANCE, Difference
from shoal.verify.measure import errors
from shoal.verify.record import Record, rows_of

# Where a difference shows first, in the order in which a step computes.
ORDER = ("output", "loss", "gradient", "buffer", "parameter", "optimizer")


def share_reference(group: Group, record: Record | None) -> Record:
    """Rank 0's record, on every rank. Collective."""
    listing = None
    if record is not None:
        listing = {
            "count": record.count,
            "tensors": {
                kind: [
                    [name, str(t.dtype).removeprefix("torch."), list(t.shape)]
                    for name, t in of.items()
                ]
                for kind, of in record.tensors.items()
            },
        }
    said = group.all_gather_json(listing, "evaluation")[0]
    shared = Record(count=said["count"])
    for kind in KINDS:
        for name, dtype, shape in said["tensors"][kind]:
            here = (
                record.tensors[kind][name].detach().clone().contiguous()
                if record is not None
                else torch.empty(shape, dtype=getattr(torch, dtype))
            )
            shared.tensors[kind][name] = group.broadcast(here, 0, "evaluation")
    return shared


@dataclass
class Comparison:
    """The errors of all steps so far, on one rank."""

    max_error: dict[str, float]
    first: Difference | None = None

    @classmethod
    def empty(cls) -> "Comparison":
        return cls({})

    def lose(self, step: int) -> None:
        """Note that the ranks came to no number at `step`, where one device did."""
        self.max_error["loss"] = float("inf")
        self.first = self.first or Difference("loss", "loss", step, float("inf"))

    def add(
        self,
        step: int,
        mine: Record,
        reference: Record,
        share: tuple[int, int],
        batch_examples: int,
    ) -> None:
        """Compare one step. ``share``: this rank's (start, stop) of the global batch."""
        for kind in ORDER:
            theirs = reference.tensors[kind]
            if kind == "output":
                theirs = {
                    name: rows_of(tensor, share, batch_examples) for name, tensor in theirs.items()
                }
            found = errors(mine.tensors[kind], theirs)
            for name, error in found.items():
                self.max_error[kind] = max(self.max_error.get(kind, 0.0), error)
                if error > TOLERANCE and self.first is None:
                    self.first = Difference(name, kind, step, error)


def cause_between_ranks(
    group: Group, first: Difference, mine: Record, reference: Record
) -> str | None:
    """What only the ranks together can tell: gradients that add up, replicas that differ.

    Collective; equal on all ranks.
    """
    if first.kind not in ("gradient", "buffer", "parameter", "optimizer"):
        return None
    other = _other_replica(group, first, mine)
    if other is not None and first.kind == "gradient" and _adds_up(group, mine, reference):
        return (
            "gradients were not summed over the replicas: each has only its own share's "
            "(their sum is right)"
        )
    return other


def _adds_up(group: Group, mine: Record, reference: Record) -> bool:
    """Whether the ranks' gradients sum to one device's. Collective.

    The names are the reference's, which all ranks have alike: a rank without a gradient takes part
    with zeros.
    """
    theirs, own = reference.tensors["gradient"], mine.tensors["gradient"]
    summed = {
        name: group.all_reduce(own.get(name, torch.zeros_like(tensor)).clone(), "evaluation")
        for name, tensor in theirs.items()
    }
    return max(errors(summed, theirs).values(), default=1.0) <= TOLERANCE


def _other_replica(group: Group, first: Difference, mine: Record) -> str | None:
    """Which rank's tensor is not rank 0's, if that is what differs. Collective."""
    tensor = mine.tensors[first.kind].get(first.name)
    digests = group.all_gather_json(None if tensor is None else digest(tensor), "evaluation")
    for rank, other in enumerate(digests):
        if other != digests[0]:
            return (
                f"replicas differ from one another: {first.kind} {first.name} on rank {rank} "
                "is not rank 0's (a stale replica, or a sum over the wrong ranks)"
            )
    return None
