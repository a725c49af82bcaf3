"""Perceptrons and what is made of them: uneven widths, several inputs, several kinds of norm.

mlp(13, 7, 11, 5)(torch.randn(4, 13))         # [4, 5]
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from zoo.subject import ADAMW, CLIPPED, Subject, cross_entropy, generator, rows_of, squared, values


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class Normed(nn.Module):
    """Batch, layer and weight norm, skips and dropout by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Linear(13, 11))
        self.norm1 = nn.BatchNorm1d(11)
        self.second, self.third = nn.Linear(11, 17), nn.Linear(17, 11, bias=False)
        self.norm2, self.drop = nn.LayerNorm(11), nn.Dropout(0.2)
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.norm1(self.first(x)))
        x = self.norm2(x + self.third(self.drop(F.softplus(self.second(x)))))
        return self.head(x)


class Recommender(nn.Module):
    """Ids of a user, ids that he liked, numbers: one dict in, one score out."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(23, 5)
        self.likes = nn.EmbeddingBag(31, 5, mode="mean")
        self.numbers = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 5))
        self.top = nn.Sequential(nn.Linear(15, 7), nn.PReLU(7), nn.Linear(7, 1))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        seen = [
            self.users(features["user"]), self.likes(features["likes"]),
            self.numbers(features["numbers"]),
        ]  # fmt: skip
        return self.top(torch.cat(seen, dim=-1)).squeeze(-1) + self.bias


def visits(step: int):
    made, n = generator(step), rows_of((13, 11, 2), step)
    features = {
        "user": torch.randint(23, (n,), generator=made),
        "likes": torch.randint(31, (n, 3), generator=made),
        "numbers": torch.randn(n, 4, generator=made),
    }
    return features, torch.randint(2, (n,), generator=made).float()


def binary(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets)


class Towers(nn.Module):
    """One network for both of two inputs, which are compared example by example."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = mlp(6, 10, 8)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.scale * F.cosine_similarity(self.tower(left), self.tower(right), dim=-1)


def pairs(step: int):
    made, n = generator(step), rows_of((10, 7, 3), step)
    left, right = torch.randn(2, n, 6, generator=made)
    return (left, right), torch.randint(2, (n,), generator=made).float()


class AutoEncoder(nn.Module):
    """Down to three numbers and back; the weights of the way back are those of the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Linear(13, 8), nn.Linear(8, 3)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(13))

    def forward(self, x: Tensor) -> Tensor:
        code = self.down2(torch.sigmoid(self.down1(x)))
        wide = torch.sigmoid(F.linear(code, self.down2.weight.t(), self.bias1))
        return F.linear(wide, self.down1.weight.t(), self.bias2)


def themselves(step: int):
    inputs, _ = values(13, classes=2, rows=(11, 9, 2))(step)
    return inputs, inputs.clone()


class Experts(nn.Module):
    """Every expert computes; the gate weighs the two that it likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(13, 4)
        self.up = nn.Parameter(torch.randn(4, 13, 9) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 9, 5) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        scores, chosen = self.gate(x).topk(2, dim=-1)
        weights = torch.zeros_like(self.gate(x)).scatter(1, chosen, scores.softmax(-1))
        hidden = F.silu(torch.einsum("ni,eih->enh", x, self.up))
        each = torch.bmm(hidden, self.down)
        return (each * weights.t().unsqueeze(-1)).sum(0)


ROWS = (11, 10, 4)


def numbers(name, model_fn, note, optimizer=ADAMW, loss=cross_entropy, rows=ROWS, **others):
    return Subject(
        name, model_fn, values(13, classes=5, rows=rows), loss, note, optimizer,
        family="perceptrons", **others,
    )  # fmt: skip


SUBJECTS = [
    numbers("mlp-uneven", lambda: mlp(13, 7, 11, 5), "widths 13, 7, 11", CLIPPED),
    numbers("mlp-deep", lambda: mlp(13, 16, 10, 16, 10, 16, 5), "six layers", loss=squared),
    numbers("mlp-wide-prime", lambda: mlp(13, 31, 29, 5), "two prime widths",
            {"name": "adam", "lr": 0.01}),
    numbers("normed", Normed, "batch norm over five, layer norm, weight norm",
            rows=(12, 10, 4), normalize_over=5),
    numbers("experts", Experts, "a mixture of experts, every one computed"),
    Subject("recommender", Recommender, visits, binary,
            "inputs in a dict, embedding bag, one score", ADAMW, family="perceptrons"),
    Subject("towers", Towers, pairs, binary,
            "the same layers for two inputs", family="perceptrons"),
    Subject("autoencoder", AutoEncoder, themselves, F.mse_loss,
            "weights used again, transposed", family="perceptrons"),
]  # fmt: skip
