"""A model in stages trains as on one device, whatever it sends past its stages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from onedevice import Case, batches_of, images, summed_cross_entropy
from staged import How, compare_staged
from torch import Tensor, nn
from torch.nn import functional

LIMIT = 1e-10


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 11), nn.GELU(),
        nn.Linear(11, 9), nn.ReLU(), nn.Linear(9, 5),
    )  # fmt: skip


def rows(examples: int, features: int = 6) -> Any:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(examples, features, generator=generator)
    return inputs, torch.randint(0, 5, (examples,), generator=generator)


MLP = Case(build=mlp, batches=batches_of(*rows(43), 20, 4), clip_norm=0.1)


def check(errors: dict[str, float]) -> None:
    assert max(errors.values()) <= LIMIT, errors


@pytest.mark.parametrize(
    ("method", "chunks"),
    [("gpipe", None), ("1f1b", None), ("interleaved", 2), ("zb", 1), ("zb", 2), ("zbv", None)],
)
@pytest.mark.parametrize("microbatches", [1, 7])
def test_every_schedule(
    pool: Any, tmp_path: Path, method: str, chunks: int | None, microbatches: int
) -> None:
    # 20, 20, 3 rows: the last step has fewer rows than microbatches.
    how = How(method, microbatches, chunks)
    check(compare_staged(pool, (("pp", 2),), MLP, tmp_path, how))


class UNet(nn.Module):
    """Long skips: what the first layers make is needed by the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.deep = nn.Conv2d(6, 8, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.mix2 = nn.Conv2d(12, 4, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.mix1, self.head = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        first = functional.relu_(self.down1(images))
        second = functional.relu(self.down2(functional.max_pool2d(first, 2)))
        deep = functional.relu(self.deep(functional.avg_pool2d(second, 2)))
        second = self.mix2(torch.cat((self.up2(deep), second), 1)).relu_()
        first = self.mix1(torch.cat((self.up1(second), first), 1))
        return self.head(first.mean((2, 3)))


class Residual(nn.Module):
    """Batch norm in residual units, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.units = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
            for _ in range(4)
        )
        self.last, self.head = nn.BatchNorm2d(4, momentum=0.3), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for unit in self.units:
            features = features + unit(features)
        return self.head(self.last(self.last(features)).mean((2, 3)))


class Tied(nn.Module):
    """A small GPT: the embedding is the head as well, and a mask is a buffer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(11, 8), nn.Parameter(torch.randn(6, 8) * 0.1)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens) + self.places
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states)).flatten(0, 1)


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(8), nn.LayerNorm(8), nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)
        self.register_buffer("mask", torch.tril(torch.ones(6, 6)).bool())

    def forward(self, states: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(states)).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~self.mask, -1e9).softmax(-1)
        states = states + self.drop(self.out(scores @ v))
        return states + self.drop(self.narrow(functional.gelu(self.wide(self.norm2(states)))))


class Forking(nn.Module):
    """A value without a gradient, one without use for its gradient, a frozen layer, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))
        self.fourth, self.unused = nn.Linear(6, 5), nn.Linear(3, 3)
        self.second.requires_grad_(False)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        early = torch.tanh(self.first(rows))
        order = rows.argsort(-1)
        middle = torch.tanh(self.second(early))
        late = torch.tanh(self.third(middle)) + early.detach() + order
        return self.fourth(late), early * 2


def of_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets.flatten())


def summed_over_tokens(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return summed_cross_entropy(outputs, targets.flatten())


def of_first(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs[0], targets)


def summed_of_first(outputs: tuple[Tensor, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    return summed_cross_entropy(outputs[0], targets)


def texts(dropout: float = 0.0) -> Case:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 11, (43, 7), generator=generator)
    batches = batches_of(tokens[:, :-1].clone(), tokens[:, 1:].clone(), 20, 4)
    return Case(
        build=lambda: Tied(dropout),
        batches=batches,
        loss=of_tokens,
        objective=summed_over_tokens,
        clip_norm=0.2,
    )


PICTURES = batches_of(*images(43, side=8), 20, 4)
UNETS = Case(build=UNet, batches=PICTURES, clip_norm=0.1)
RESIDUAL = Case(build=Residual, batches=PICTURES, normalize_over=3)
FORKS = Case(build=Forking, batches=MLP.batches, loss=of_first, objective=summed_of_first)
PP2, PP3, PP4 = (("pp", 2),), (("pp", 3),), (("pp", 4),)
PP2_DP2, DP2_PP2 = (("pp", 2), ("dp", 2)), (("dp", 2), ("pp", 2))


@pytest.mark.parametrize(
    ("case", "axes", "how"),
    [
        (UNETS, PP4, How("1f1b", 5)),
        (UNETS, PP3, How("zb", 4)),
        (RESIDUAL, PP4, How("gpipe", 3)),
        (RESIDUAL, PP3, How("1f1b", 4)),
        (RESIDUAL, PP2, How("zbv", 5)),
        (RESIDUAL, PP2_DP2, How("1f1b", 3)),
        (texts(), PP4, How("1f1b", 8)),
        (texts(), PP3, How("interleaved", 6, 2)),
        (texts(), PP2, How("zb", 3, 2)),
        (texts(), PP2_DP2, How("1f1b", 4)),
        (texts(), DP2_PP2, How("zbv", 3)),
        (MLP, PP2_DP2, How("interleaved", 4, 2)),
        (MLP, PP2_DP2, How("zb", 30)),
        (FORKS, PP4, How("1f1b", 4)),
        (FORKS, PP2, How("zb", 4)),
        (RESIDUAL, (("dp", 2),), How("1f1b", 3)),
        (RESIDUAL, PP2, How("1f1b", 4, recompute=True)),
        (texts(0.2), PP2, How("1f1b", 4, random=True)),
        (texts(0.2), PP2_DP2, How("zb", 3, recompute=True, random=True)),
    ],
)
def test_equal_to_one_device(pool: Any, tmp_path: Path, case: Case, axes: Any, how: How) -> None:
    check(compare_staged(pool, axes, case, tmp_path, how))
