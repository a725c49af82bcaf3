"""Whole parameters from the ranks' rows of them, and rows of the sum of their gradients.

whole    [ r0 | r1 | r2 ]    one collective for each large one whose rows divide evenly,
padded   [ r0 _ | r1 _ | r2 _ ]    one for all others together

gather(cuts, group)          # fills each parameter
reduce(cuts, group)          # takes each parameter's gradient, adds to its piece's
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.comm import Group
from shoal.parallel.zero.twin import rows

ALONE_BYTES = 256 << 10  # of a parameter that travels without being copied


@dataclass(frozen=True)
class Cut:
    """A parameter, contiguous, and the rows of it that this rank keeps."""

    parameter: nn.Parameter
    piece: nn.Parameter
    padded: int  # elements of the largest piece

    def travels_alone(self, ranks: int) -> bool:
        size = self.parameter.numel() * self.parameter.element_size()
        return size >= ALONE_BYTES and self.parameter.shape[0] % ranks == 0


def gather(cuts: Sequence[Cut], group: Group) -> None:
    """Fill the memory of each parameter with all ranks' rows. Collective."""
    for cut in cuts:
        if cut.travels_alone(group.size):
            group.all_gather_into(cut.parameter.data, cut.piece.detach(), "parameter")
    for bunch in _bunches(cuts, group.size):
        every = _buffer(bunch, group.size)
        mine = every[group.rank]
        _copy(_places(bunch, mine, group.rank, group.size), [c.piece.detach() for c in bunch])
        group.all_gather_into(every, mine, "parameter")
        for rank, flat in enumerate(every):
            # Through `data`: what autograd keeps of the parameter is to find it unchanged.
            wholes = [_rows_of(c.parameter.data, rank, group.size) for c in bunch]
            _copy(wholes, _places(bunch, flat, rank, group.size))


def reduce(cuts: Sequence[Cut], group: Group) -> None:
    """Add this rank's rows of the sum of all gradients to its pieces'. Collective.

    A parameter without a gradient has one of zeros. Those of parameters are gone afterwards.
    """
    for cut in cuts:
        if cut.travels_alone(group.size):
            whole = cut.parameter.grad
            whole = torch.zeros_like(cut.parameter) if whole is None else whole.contiguous()
            own = torch.empty_like(cut.piece)
            group.reduce_scatter(own, whole, "gradient")
            _add(cut, own)
    for bunch in _bunches(cuts, group.size):
        every = _buffer(bunch, group.size).zero_()
        here = [cut for cut in bunch if cut.parameter.grad is not None]
        for rank, flat in enumerate(every):
            places = dict(zip(bunch, _places(bunch, flat, rank, group.size), strict=True))
            parts = [_rows_of(c.parameter.grad, rank, group.size) for c in here]
            _copy([places[c] for c in here], parts)
        own = every.new_empty(every.shape[1])
        group.reduce_scatter(own, every, "gradient")
        for cut, part in zip(bunch, _places(bunch, own, group.rank, group.size), strict=True):
            _add(cut, part.clone() if len(bunch) > 1 else part)


def _add(cut: Cut, gradient: Tensor) -> None:
    cut.parameter.grad = None
    if cut.piece.grad is None:
        cut.piece.grad = gradient
    else:
        cut.piece.grad.add_(gradient)


def _bunches(cuts: Sequence[Cut], ranks: int) -> Iterator[list[Cut]]:
    """What travels together: of one type."""
    kinds: dict[torch.dtype, list[Cut]] = {}
    for cut in cuts:
        if not cut.travels_alone(ranks):
            kinds.setdefault(cut.parameter.dtype, []).append(cut)
    yield from kinds.values()


def _buffer(bunch: Sequence[Cut], ranks: int) -> Tensor:
    return bunch[0].piece.detach().new_empty(ranks, sum(cut.padded for cut in bunch))


def _places(bunch: Sequence[Cut], flat: Tensor, rank: int, ranks: int) -> list[Tensor]:
    """Where a rank's pieces lie in its flat row."""
    found, first = [], 0
    for cut in bunch:
        start, stop = rows(cut.parameter.shape[0], ranks, rank)
        shape = (stop - start, *cut.parameter.shape[1:])
        size = (stop - start) * (cut.parameter.numel() // max(1, cut.parameter.shape[0]))
        found.append(flat[first : first + size].view(shape))
        first += cut.padded
    return found


def _rows_of(tensor: Tensor | None, rank: int, ranks: int) -> Tensor:
    assert tensor is not None
    start, stop = rows(tensor.shape[0], ranks, rank)
    return tensor[start:stop]


def _copy(to: list[Tensor], what: list[Tensor]) -> None:
    if to:
        torch._foreach_copy_(to, what)
