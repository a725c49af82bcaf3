"""The small models that bugs are planted into; each shows in a fraction of a second."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Tied(nn.Module):
    """A language model of which the embedding is the head."""

    def __init__(self, words: int = 40, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens)
        x = x + self.second(functional.gelu(self.first(x)))
        return self.head(self.norm(x))


class Skips(nn.Module):
    """Layers with a long skip from the first to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.middle = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        early = x = torch.tanh(self.first(x))
        for layer in self.middle:
            x = torch.tanh(layer(x))
        return self.last(torch.cat((x, early), 1))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 3)
    )


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.Dropout(0.5), nn.Tanh(), nn.Linear(24, 3))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 3)),
        nn.Conv1d(2, 4, 1),
        nn.BatchNorm1d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def numbers(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + step)
    return torch.randn(11, 6), torch.randint(3, (11,))


def tokens(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(200 + step)
    return torch.randint(40, (7, 5)), torch.randint(40, (7, 5))


def masked(step: int) -> tuple[Tensor, Tensor]:
    inputs, targets = tokens(step)
    return inputs, targets.masked_fill(torch.rand(targets.shape) < 0.4, -100)


def classes_loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
    return functional.cross_entropy(outputs, targets, reduction="sum"), len(targets)


def words_loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Any]:
    flat = targets.reshape(-1)
    total = functional.cross_entropy(outputs.flatten(0, 1), flat, reduction="sum")
    return total, int((flat != -100).sum())


SUBJECTS = {
    "perceptron": (perceptron, numbers, classes_loss),
    "dropping": (dropping, numbers, classes_loss),
    "normed": (normed, numbers, classes_loss),
    "skips": (Skips, numbers, classes_loss),
    "tied": (Tied, tokens, words_loss),
    "masked": (Tied, masked, words_loss),
}
