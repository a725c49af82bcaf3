"""Parts of a sequence in a rewritten graph: where they begin and end."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.comm import Group
from shoal.parallel.tensor import apply, cut_sequences, plan
from shoal.trace.traced import Traced, trace


class Blocks(nn.Module):
    def __init__(self, *, view: bool = False) -> None:
        super().__init__()
        self.view = view
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(12, 48) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(48, 12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            y = F.dropout(down(F.gelu(up(norm(x)))), 0.1, self.training)
            x = x + (y.flip(1) if self.view else y)
        return self.norms[2](x)


def cut(model: nn.Module, x: Tensor, rank: int = 0) -> tuple[Traced, tuple[str, ...]]:
    group = Group(rank, 2)
    traced = trace(model, (x,), len(x))
    mine = apply(plan(traced, 2, model), traced, model, group)
    return mine, cut_sequences(mine, model, group)


def names(traced: Traced) -> list[str]:
    return [getattr(node.target, "__name__", "") for node in traced.graph.nodes]


def test_sums_are_scattered_and_norms_collected() -> None:
    mine, lines = cut(Blocks(), torch.randn(2, 7, 12))
    found = names(mine)
    assert found.count("tensor_scatter_sum") == 2
    assert "tensor_leave" not in found
    assert found.count("tensor_collect") == 1  # before the second block
    assert "sequences of 7 lie in parts on 2 ranks" in lines[0]


def test_dropout_knows_where_its_part_of_the_whole_is() -> None:
    for rank, told in ((0, (1, 0, 7)), (1, (1, 4, 7))):
        mine, _ = cut(Blocks(), torch.randn(2, 7, 12), rank)
        drops = [n for n in mine.graph.nodes if "dropout" in str(n.target)]
        assert [node.meta["cut"] for node in drops] == [told, told]
        assert [node.meta["val"].shape[1] for node in drops] == [4 - rank] * 2


def test_what_is_not_row_by_row_gets_the_whole_value() -> None:
    mine, _ = cut(Blocks(view=True), torch.randn(2, 7, 12))
    flips: list[Any] = [n for n in mine.graph.nodes if "flip" in str(n.target)]
    assert [n.args[0].target.__name__ for n in flips] == ["tensor_gather"] * 2
    assert all("cut" not in node.meta for node in flips)


def test_a_model_without_sequences_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 12))
    for x in (torch.randn(2, 12), torch.randn(2, 1, 12)):
        mine, lines = cut(model, x)
        assert "tensor_leave" in names(mine)
        assert lines[0].startswith("sp: nothing")
