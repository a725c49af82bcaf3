"""Which parts of a model are recomputed, and what that does to one rank."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.comm import Group
from shoal.errors import Refused
from shoal.models import ResNet, ResNetOptions, Transformer, TransformerOptions, mlp
from shoal.parallel.batch_groups import BatchGroups
from shoal.parallel.randomness import StepKey
from shoal.parallel.recompute import find_blocks, use_recompute


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        self.ran = 0

    def forward(self, input: Tensor) -> Tensor:
        self.ran += 1
        return input + self.layers(input)


class OwnSequence(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


def stage(count: int = 2) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(count)))


def types(model: nn.Module) -> list[str]:
    return [type(block).__name__ for block in find_blocks(model)]


def test_residual_units_of_a_resnet() -> None:
    assert len(find_blocks(ResNet(ResNetOptions(depth=18, width=2)))) == 8
    assert len(find_blocks(ResNet(ResNetOptions(depth=50, width=2)))) == 16


def test_blocks_of_transformers() -> None:
    assert types(Transformer(TransformerOptions(classes=2, length=4, vocab=9))) == ["Block"] * 4
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 3, enable_nested_tensor=False
    )
    assert types(encoder) == ["TransformerEncoderLayer"] * 3


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (stage(3), ["Block"] * 3),
        (nn.Sequential(nn.Linear(4, 4), stage(), stage()), ["Block"] * 4),
        (nn.ModuleList([nn.ModuleList([Block()]), Block()]), ["Block"] * 2),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ReLU()), ["Sequential"]),
        (nn.Sequential(OwnSequence(nn.Linear(4, 4), Block())), ["OwnSequence"]),
        (nn.Sequential(nn.Sequential(nn.ReLU(), nn.Flatten())), []),
        (mlp(4, 2), []),
        (Block(), []),
    ],
)
def test_containers_are_looked_into(model: nn.Module, expected: list[str]) -> None:
    assert types(model) == expected


def test_a_shared_block_is_found_once() -> None:
    block = Block()
    model = nn.Sequential(nn.Sequential(block, Block()), nn.Sequential(block))
    assert len(find_blocks(model)) == 2


def prepared(model: nn.Module) -> Any:
    groups, key = BatchGroups(None, Group(0, 1)), StepKey(0)
    groups.begin(torch.arange(3), 3, [(0, 3)])
    key.begin(0, torch.arange(3), 0)
    return use_recompute(model, groups, key)


def test_blocks_run_again_in_the_backward_pass_of_training_only() -> None:
    model = stage()
    assert prepared(model) == 2
    model(torch.randn(3, 4)).sum().backward()
    assert [block.ran for block in model] == [2, 2]
    model.eval()(torch.randn(3, 4)).sum().backward()
    assert [block.ran for block in model] == [3, 3]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(Refused, match="no blocks"):
        prepared(mlp(4, 2))


def test_names_stay() -> None:
    model = stage()
    before = list(model.state_dict())
    prepared(model)
    assert list(model.state_dict()) == before
