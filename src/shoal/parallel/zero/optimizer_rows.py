"""zero1: parameters and gradients whole on every rank, the optimizer's state by rows.

    gradient    [ r0 | r1 | r2 ]   summed over the replicas as without ZeRO
    optimizer          r1          this rank updates its rows, in place
    parameter   [ r0 | r1 | r2 ]   and gets the others' rows: one all-gather of all parameters

The bytes of a step are those of plain replicas and, for each parameter, its largest piece.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.comm import Group
from shoal.layout import Part
from shoal.parallel.zero.states import norm_of, scale
from shoal.parallel.zero.twin import Twin, rows

GATHER_BYTES = 8 << 20  # of one rank, at once


@dataclass(frozen=True)
class Cut:
    """A parameter and the rows of it that this rank updates: a view."""

    parameter: nn.Parameter
    piece: nn.Parameter
    start: int
    stop: int
    padded: int  # elements of the largest piece


class OptimizerRows:
    """This rank's rows of every parameter that is trained. A 0-d one is whole on all ranks."""

    in_step = False

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._model = model
        self._group = group
        self._cuts: list[Cut] = []
        self._by_piece: dict[int, Cut] = {}
        twin = Twin(model)
        twin.fill(self._piece)
        self.holding = twin.root
        self._bunches = list(_bunches(self._cuts))

    def _piece(self, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.dim() == 0 or not parameter.requires_grad:
            return parameter
        size, ranks = parameter.shape[0], self._group.size
        start, stop = rows(size, ranks, self._group.rank)
        piece = nn.Parameter(parameter.detach()[start:stop])
        padded = -(-size // ranks) * (parameter.numel() // max(1, size))
        self._cuts.append(Cut(parameter, piece, start, stop, padded))
        self._by_piece[id(piece)] = self._cuts[-1]
        return piece

    def layout(self, whole: dict[str, Part]) -> dict[str, Part]:
        cut = dict(whole)
        for name, piece in self.holding.named_parameters(remove_duplicate=False):
            if (known := self._by_piece.get(id(piece))) is not None:
                cut[name] = whole[name].narrow(0, known.start, known.stop)
        return cut

    def finish(self) -> None:
        return

    def take_gradients(self, factor: float) -> None:
        scale(self._model, factor)
        for each in self._cuts:
            whole = each.parameter.grad
            each.piece.grad = None if whole is None else whole[each.start : each.stop]

    def norm(self) -> Tensor:
        return norm_of(self._model)

    @torch.no_grad()
    def spread(self) -> None:
        for each in self._cuts:
            each.parameter.grad = None
        for bunch in self._bunches:
            self._gather(bunch)

    def _gather(self, bunch: list[Cut]) -> None:
        length = sum(each.padded for each in bunch)
        every = bunch[0].piece.new_empty(self._group.size, length)
        mine = every[self._group.rank]
        torch._foreach_copy_(*self._pairs(bunch, mine, self._group.rank))
        self._group.all_gather_into(every, mine, "parameter")
        for rank, row in enumerate(every):
            if rank != self._group.rank:
                sent, places = self._pairs(bunch, row, rank)
                torch._foreach_copy_(places, sent)

    def _pairs(
        self, bunch: list[Cut], flat: Tensor, rank: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The places of a rank's pieces in its flat row, and in the parameters."""
        packed, places, first = [], [], 0
        for each in bunch:
            start, stop = rows(each.parameter.shape[0], self._group.size, rank)
            place = each.parameter.detach()[start:stop]
            packed.append(flat[first : first + place.numel()].view(place.shape))
            places.append(place)
            first += each.padded
        return packed, places


def _bunches(cuts: list[Cut]) -> Iterator[list[Cut]]:
    """Pieces that travel together: of one type and device, of at most `GATHER_BYTES` or alone."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Cut]] = {}
    for each in cuts:
        kinds.setdefault((each.piece.dtype, each.piece.device), []).append(each)
    for same in kinds.values():
        bunch: list[Cut] = []
        room = GATHER_BYTES
        for each in same:
            size = each.padded * each.piece.element_size()
            if bunch and size > room:
                yield bunch
                bunch, room = [], GATHER_BYTES
            bunch.append(each)
            room -= size
        if bunch:
            yield bunch
