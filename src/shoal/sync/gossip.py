"""`gossip`: after each step a replica averages with its neighbours only.

    ring           w_r ← (w_r + w_{r-1} + w_{r+1}) / 3            (Lian et al. 2017; of two: / 2)
    exponential    w_r ← (w_r + w_{r - 2^k}) / 2,   k = step mod ⌈log₂ n⌉     (Assran et al. 2019)
    complete       the mean of all, which is `local:1`

In the exponential graph each replica sends to one and hears from one, so that the numbers that
push-sum divides by stay 1; of n = 2^j replicas j steps make the exact mean. Replicas count the
same, however many examples they have; one without examples averages all the same. Float buffers are
averaged likewise. The run ends with the mean over all, which is also what is evaluated.

Messages go from rank to rank, none through all. On a GPU they go through the host's memory: two
ranks of NCCL that both send first would wait for each other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.comm import Group
from shoal.strategy import Gossip
from shoal.sync.average import PIECE_BYTES, average, pieces
from shoal.sync.meetings import MeanOfReplicas, Setting, floating
from shoal.sync.sums import flat_of, spread


class Neighbours(MeanOfReplicas):
    """Replicas that hear from their neighbours at each step."""

    hidden_s = 0.0

    def __init__(self, agreement: Gossip, setting: Setting) -> None:
        super().__init__(setting)
        self._graph, self._setting = agreement.graph, setting
        self._tensors = list(floating(setting.model).values())

    def gradients(self, step: int, count: float) -> bool:
        return False

    def after(self, step: int) -> None:
        """Average with the neighbours; at the end with all."""
        group = self._setting.between
        if self._setting.is_last(step):
            average(self._tensors, 1 / group.size, group)
            self.are_equal = True
            return
        to, sources = neighbours(self._graph, group.rank, group.size, step)
        if sources:
            mix(self._tensors, to, sources, group)

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        return


def neighbours(graph: str, rank: int, size: int, step: int) -> tuple[list[int], list[int]]:
    """To whom `rank` of `size` sends after a step, and from whom it hears."""
    if size == 1:
        return [], []
    if graph == "ring":
        both = sorted({(rank - 1) % size, (rank + 1) % size})
        return both, both
    hop = 1 << step % (size - 1).bit_length()
    return [(rank + hop) % size], [(rank - hop) % size]


def mix(tensors: Sequence[Tensor], to: list[int], sources: list[int], group: Group) -> None:
    """Replace each tensor by the mean of this rank's and those of `sources`."""
    with torch.no_grad():
        for piece in pieces(tensors, PIECE_BYTES):
            own = flat_of(piece)
            message = own.cpu()  # itself, if it is there already
            sent = [group.send_later(message, rank, "parameter") for rank in to]
            total = own.clone()
            for source in sources:
                total += group.receive(torch.empty_like(message), source, "parameter").to(own)
            for each in sent:
                each.wait()
            spread(total / (len(sources) + 1), piece)
