"""Parameters that several stages hold: the sum of the gradients that each stage has of them.

stage 0   embedding.weight: g₀   ─┐         g₀ + g₂, in the order of stages,
stage 2   head.weight: g₂        ─┘         the same bits on both

Tied(group, {parameter: (0, 2)}).sum_gradients()
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shoal.comm import Group


class Tied:
    """``holders``: the ranks of `group` that hold a parameter, ascending; for those of this rank.

    All ranks give their parameters in one order.
    """

    def __init__(self, group: Group, holders: Mapping[nn.Parameter, tuple[int, ...]]) -> None:
        self._group = group
        self._holders = {p: ranks for p, ranks in holders.items() if len(ranks) > 1}

    def counts_elsewhere(self, parameter: nn.Parameter) -> bool:
        """Whether another rank before this one holds the parameter as well."""
        return self._holders.get(parameter, (self._group.rank,))[0] != self._group.rank

    def sum_gradients(self) -> None:
        """Sum over the stages. A parameter that none of them has used gets no gradient."""
        for parameter, ranks in self._holders.items():
            if parameter.requires_grad:
                self._sum(parameter, ranks)

    def _sum(self, parameter: nn.Parameter, ranks: tuple[int, ...]) -> None:
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        flat = own.detach().reshape(-1).clone()
        used = flat.new_tensor([0.0 if parameter.grad is None else 1.0])
        others = [rank for rank in ranks if rank != self._group.rank]
        sending = [self._group.send_later(used, rank, "agreement") for rank in others]
        sending += [self._group.send_later(flat, rank, "gradient") for rank in others]
        total, counted = torch.zeros_like(flat), torch.zeros_like(used)
        for rank in ranks:
            mine = rank == self._group.rank
            counted += used if mine else self._receive(used, rank, "agreement")
            total += flat if mine else self._receive(flat, rank, "gradient")
        for pending in sending:
            pending.wait()
        if not bool(counted):
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = own.copy_(total.view(own.shape))
        else:
            parameter.grad.copy_(total.view(own.shape))

    def _receive(self, like: Tensor, source: int, purpose: str) -> Tensor:
        return self._group.receive(torch.empty_like(like), source, purpose)  # type: ignore[arg-type]
