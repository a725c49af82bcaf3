"""A loss that is no number, where ranks have different gradients to send."""

from typing import Any

import torch
from onedevice import Case, assembled
from torch import Tensor, nn

from shoal.errors import NotFinite


class Branching(nn.Module):
    """Uses one of its layers only where the first input says so."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(4, 3)
        self.sometimes = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.always(x)
        return outputs + self.sometimes(x) if x[0, 0] > 0 else outputs


def _train(groups: Any) -> list[Any]:
    from shoal.train.step import Flags, train_step

    inputs = torch.ones(4, 4)
    inputs[2:] = -1  # rank 1 leaves a layer out
    inputs[3, 1] = float("nan")
    targets = torch.zeros(4, dtype=torch.long)
    job = assembled(groups, Case(build=Branching, batches=[(inputs, targets)]))
    try:
        train_step(job, 0, Flags())
    except NotFinite as error:
        return [error.rank, error.step]
    return []


def test_the_rank_is_named_by_all(pool: Any) -> None:
    """Rank 0 has sent its gradients when it sees the loss; rank 1 sends the rest when it must."""
    assert pool.run(_train, ranks=2) == [[1, 0], [1, 0]]
