"""Of other kinds again: one dimension, windows, spectra, graphs, cells in a loop, several tasks.

Spectral()(torch.randn(4, 2, 16))         # a Fourier layer, complex numbers inside
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.subject import ADAMW, CLIPPED, Subject, cross_entropy, generator, rows_of, values


class Waves(nn.Module):
    """Dilated causal convolutions with gates; every layer adds to the answer."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.start = nn.Conv1d(2, channels, 1)
        self.filters, self.gates, self.skips = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(3):
            self.filters.append(nn.Conv1d(channels, channels, 2))
            self.gates.append(nn.Conv1d(channels, channels, 2))
            self.skips.append(nn.Conv1d(channels, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), torch.zeros(())
        for level, (make, gate, skip) in enumerate(
            zip(self.filters, self.gates, self.skips, strict=True)
        ):
            step = 2**level
            shape = F.pad(x, (step, 0))
            weights = {"dilation": step}
            made = torch.tanh(F.conv1d(shape, make.weight, make.bias, **weights))
            made = made * torch.sigmoid(F.conv1d(shape, gate.weight, gate.bias, **weights))
            total = total + skip(made).mean(-1)
            x = x + made
        return total


class Windows(nn.Module):
    """Attention in windows of a picture, which are moved by half a window in the next layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, width, 2, stride=2)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(2, 4, 4)) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def attend(self, layer: int, x: Tensor) -> Tensor:
        n, rows, columns, width = x.shape
        cut = x.view(n, rows // 2, 2, columns // 2, 2, width).transpose(2, 3).reshape(-1, 4, width)
        q, k, v = self.qkv[layer](cut).view(-1, 4, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * (width // 2) ** -0.5 + self.bias[layer]
        seen = (scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, width)
        seen = self.out[layer](seen).view(n, rows // 2, columns // 2, 2, 2, width)
        return seen.transpose(2, 3).reshape(n, rows, columns, width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).permute(0, 2, 3, 1)
        x = x + self.attend(0, self.norm(x))
        moved = torch.roll(x, (-1, -1), dims=(1, 2))
        x = x + torch.roll(self.attend(1, self.norm(moved)), (1, 1), dims=(1, 2))
        return self.head(x.mean((1, 2)))


class Spectral(nn.Module):
    """A layer that mixes channels frequency by frequency."""

    def __init__(self, width: int = 6, kept: int = 4) -> None:
        super().__init__()
        self.kept = kept
        self.lift, self.local = nn.Conv1d(2, width, 1), nn.Conv1d(width, width, 1)
        self.weights = nn.Parameter(torch.randn(2, width, width, kept) * 0.2)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x)
        weights = torch.complex(self.weights[0], self.weights[1])
        spectrum = torch.fft.rfft(x)
        low = torch.einsum("nif,iof->nof", spectrum[..., : self.kept], weights)
        rest = torch.zeros_like(spectrum)[..., self.kept :]
        x = F.gelu(torch.fft.irfft(torch.cat([low, rest], -1), n=x.shape[-1]) + self.local(x))
        return self.head(x.mean(-1))


class Graphs(nn.Module):
    """Messages along the edges of a graph, one graph an example."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(4, 9), nn.Linear(4, 9, bias=False)
        self.second, self.head = nn.Linear(18, 7), nn.Linear(7, 3)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        degrees = edges.sum(-1, keepdim=True).clamp(min=1)
        x = F.relu(self.own(nodes) + torch.bmm(edges, self.others(nodes)) / degrees)
        x = F.relu(self.second(torch.cat([x, torch.bmm(edges, x) / degrees], -1)))
        return self.head(x.amax(1))


def graphs(step: int) -> tuple[Any, Any]:
    made, n = generator(step), rows_of((9, 7, 2), step)
    edges = (torch.rand(n, 6, 6, generator=made) < 0.4).float()
    nodes = torch.randn(n, 6, 4, generator=made)
    return (nodes, edges), torch.randint(3, (n,), generator=made)


class Cells(nn.Module):
    """An LSTM cell in a Python loop, with a state that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.gate = nn.LSTMCell(5, 8), nn.GRUCell(8, 6)
        self.start = nn.Parameter(torch.randn(8) * 0.1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        hidden = self.start.expand(n, 8)
        memory, slow = torch.zeros_like(hidden), x.new_zeros(n, 6)
        for step in x.unbind(1):
            hidden, memory = self.cell(step, (hidden, memory))
            slow = self.gate(hidden, slow)
        return self.head(slow)


class Branches(nn.Module):
    """Four ways side by side, put together again; a second head half way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.one, self.three = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 3, padding=1)
        self.five = nn.Sequential(nn.Conv2d(6, 3, 1), nn.ReLU(), nn.Conv2d(3, 4, 5, padding=2))
        self.pooled = nn.Conv2d(6, 3, 1)
        self.norm = nn.InstanceNorm2d(16, affine=True)
        self.halfway, self.head = nn.Linear(16, 5), nn.Linear(6, 1)
        self.last = nn.Conv2d(16, 6, 3, stride=2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(images))
        ways = [self.one(x), self.three(x), self.five(x)]
        ways.append(self.pooled(F.avg_pool2d(x, 3, stride=1, padding=1)))
        x = F.relu(self.norm(torch.cat(ways, 1)))
        late = F.adaptive_max_pool2d(F.relu(self.last(x)), 1).flatten(1)
        return {"kind": self.halfway(x.mean((2, 3))), "size": self.head(late).squeeze(1)}


def two_tasks(step: int) -> tuple[Any, Any]:
    images, kinds = values(2, 8, 8, classes=5, rows=(9, 7, 4))(step)
    return images, {"kind": kinds, "size": images.mean((1, 2, 3))}


def both_losses(outputs: Any, targets: Any) -> Tensor:
    kind = F.cross_entropy(outputs["kind"], targets["kind"])
    return kind + 0.3 * F.smooth_l1_loss(outputs["size"], targets["size"])


class Larger(nn.Module):
    """Makes pictures larger: pixel shuffle, a skip around everything, reflected borders."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 7, 3, padding=1, padding_mode="reflect")
        self.middle = nn.ModuleList(nn.Conv2d(7, 7, 3, padding=1) for _ in range(3))
        self.last, self.shuffle = nn.Conv2d(7, 2 * 4, 3, padding=1), nn.PixelShuffle(2)

    def forward(self, images: Tensor) -> Tensor:
        x = first = self.first(images)
        for layer in self.middle:
            x = x + 0.5 * layer(F.mish(x))
        base = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
        return base + self.shuffle(self.last(x + first))


def small_and_large(step: int) -> tuple[Any, Any]:
    made, n = generator(step), rows_of((7, 5, 2), step)
    return torch.randn(n, 2, 5, 6, generator=made), torch.randn(n, 2, 10, 12, generator=made)


class DropPath(nn.Module):
    """Whole blocks are left out, example by example."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.head = nn.Linear(13, 9), nn.Linear(9, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(9, 14), nn.GELU(), nn.Linear(14, 9)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            out = block(x)
            if self.training:
                kept = x.new_empty((x.shape[0], 1)).bernoulli_(0.8)
                out = out * kept / 0.8
            x = x + out
        return self.head(x)


class Hyper(nn.Module):
    """Weights of a layer that are computed for each example, and a low-rank update."""

    def __init__(self) -> None:
        super().__init__()
        self.make = nn.Linear(13, 6 * 4)
        self.base = nn.Linear(13, 6)
        self.low, self.high = nn.Linear(13, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.base.requires_grad_(False)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(self.base(x) + 2.0 * self.high(self.low(x)))
        weights = self.make(x).view(-1, 6, 4)
        return self.head(torch.einsum("ni,nio->no", inner, weights))


def other(name, model_fn, batch, note, loss=cross_entropy, optimizer=ADAMW, **more):
    return Subject(name, model_fn, batch, loss, note, optimizer, family="others", **more)


SERIES = values(2, 16, classes=5, rows=(9, 7, 2))
SQUARES = values(2, 8, 8, classes=5, rows=(7, 5, 2))
STEPS = values(4, 5, classes=4, rows=(9, 7, 2))
NUMBERS = values(13, classes=5, rows=(11, 9, 2))

SUBJECTS = [
    other("waves", Waves, SERIES, "1D, dilated, weights used by hand", optimizer=CLIPPED),
    other("windows", Windows, SQUARES, "attention in moved windows, batch folded with them"),
    other("spectral", Spectral, SERIES, "Fourier transforms, complex numbers"),
    other("graphs", Graphs, graphs, "products with a matrix from the inputs, max over nodes"),
    other("cells", Cells, STEPS, "LSTM and GRU cells in a loop, a learned state"),
    other("branches", Branches, two_tasks, "side by side, two heads, targets in a dict",
          loss=both_losses),
    other("larger", Larger, small_and_large, "pixel shuffle, reflected borders", loss=F.l1_loss),
    other("drop-path", DropPath, NUMBERS, "Tensor.bernoulli_ in forward"),
    other("hyper", Hyper, NUMBERS, "weights by example, a frozen layer with a low-rank update"),
]  # fmt: skip
