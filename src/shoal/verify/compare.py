"""Every rank's record beside one device's: rank 0 has the latter and shows it to the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.errors import RunError
from shoal.layout import Layout
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
        if kind == "loss":
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
        held: Held,
    ) -> None:
        """Compare one step's record with what `held` says that this rank has of the reference."""
        for kind in ORDER:
            theirs = reference.tensors[kind]
            found = errors(mine.tensors[kind], held.of(kind, theirs), whole=theirs)
            for name, error in found.items():
                self.max_error[kind] = max(self.max_error.get(kind, 0.0), error)
                if error > TOLERANCE and self.first is None:
                    self.first = Difference(name, kind, step, error)


def cause_between_ranks(
    group: Group, first: Difference, mine: Record, reference: Record, layout: Layout
) -> str | None:
    """What only the ranks together can tell: gradients that add up, replicas that differ.

    Nothing where ranks hold pieces. Collective; equal on all ranks.
    """
    cut = any(not part.is_whole for part in layout.values())
    if any(group.all_gather_json(cut, "evaluation")):
        return None
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
