"""Networks for images and videos: ResNets, a U-Net, dense skips, convolutions in groups.

resnet("batch", 18, "standard")()         # a module
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.subject import ADAMW, CLIPPED, Subject, cross_entropy, maps, values


def resnet(norm: str, depth: int, conv: str) -> Callable[[], nn.Module]:
    """A ResNet of Shoal's own, a plain module too."""

    def build() -> nn.Module:
        from shoal.models.resnet import ResNet, ResNetOptions

        return ResNet(
            ResNetOptions(
                depth=depth, conv=conv, norm=norm, width=4, classes=5, in_channels=2, stem="small"
            )
        )

    return build


class UNet(nn.Module):
    """Two levels down and up; what a level had before is put beside what comes back."""

    def __init__(self, width: int = 4, batch_norm: bool = False) -> None:
        super().__init__()

        def double(inputs: int, outputs: int) -> nn.Sequential:
            norm = nn.BatchNorm2d(outputs) if batch_norm else nn.GroupNorm(2, outputs)
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1), norm, nn.ReLU(inplace=True),
                nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(inplace=True),
            )  # fmt: skip

        self.down1, self.down2 = double(2, width), double(width, 2 * width)
        self.middle = double(2 * width, 4 * width)
        self.rise2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up2 = double(4 * width, 2 * width)
        self.rise1 = nn.Conv2d(2 * width, width, 1)
        self.up1 = double(2 * width, width)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(F.max_pool2d(first, 2))
        deep = self.middle(F.max_pool2d(second, 2))
        deep = self.up2(torch.cat([self.rise2(deep), second], dim=1))
        larger = F.interpolate(self.rise1(deep), scale_factor=2, mode="nearest")
        return self.head(self.up1(torch.cat([larger, first], dim=1)))


class DenseNet(nn.Module):
    """Each layer reads everything that the layers of its block have made."""

    def __init__(self, growth: int = 3, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 5, 3, padding=1, bias=False)
        channels = 5
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            block = nn.ModuleList()
            for _ in range(layers):
                block.append(
                    nn.Sequential(
                        nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 8, 1, bias=False),
                        nn.BatchNorm2d(8), nn.ReLU(),
                        nn.Conv2d(8, growth, 3, padding=1, bias=False),
                    )
                )  # fmt: skip
                channels += growth
            self.blocks.append(block)
            self.transitions.append(
                nn.Sequential(nn.Conv2d(channels, channels // 2, 1), nn.AvgPool2d(2))
            )
            channels //= 2
        self.head = nn.Linear(channels, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            features = [x]
            for layer in block:
                features.append(layer(torch.cat(features, 1)))
            x = transition(torch.cat(features, 1))
        return self.head(x.mean((2, 3)))


class VideoNet(nn.Module):
    """Convolutions over time, height and width; one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 6, (1, 3, 3), padding=(0, 1, 1))
        self.norm1 = nn.BatchNorm3d(6)
        self.time = nn.Conv3d(6, 6, (3, 1, 1), padding=(1, 0, 0), groups=3)
        self.grow = nn.Conv3d(6, 8, 3, padding=1, stride=(1, 2, 2))
        self.norm2 = nn.BatchNorm3d(8)
        self.drop = nn.Dropout3d(0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, clips: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(clips)))
        x = x + self.time(x)
        x = self.drop(F.relu(self.norm2(self.grow(x))))
        return self.head(F.adaptive_avg_pool3d(x, 1).flatten(1))


class Inverted(nn.Module):
    """MobileNet's block: wide, depthwise, weighted by channel, narrow; with a skip."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, wide, 1, bias=False)
        self.norm1 = nn.GroupNorm(1, wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.squeeze, self.excite = nn.Conv2d(wide, 3, 1), nn.Conv2d(3, wide, 1)
        self.project = nn.Conv2d(wide, channels, 1, bias=False)
        self.norm2 = nn.GroupNorm(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.hardswish(self.norm1(self.expand(x)))
        out = F.silu(self.depthwise(out))
        weights = self.excite(F.relu(self.squeeze(out.mean((2, 3), keepdim=True))))
        return x + self.norm2(self.project(out * torch.sigmoid(weights)))


class MobileNet(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.Hardswish(),
            Inverted(6, 10), Inverted(6, 14), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(6, 5),
        )  # fmt: skip


class ConvNeXtBlock(nn.Module):
    """Depthwise 7×7, then a perceptron over channels put last, scaled by a weight of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        out = self.scale * self.down(F.gelu(self.up(out)))
        return x + out.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 6, 2, stride=2)
        self.blocks = nn.Sequential(ConvNeXtBlock(6), ConvNeXtBlock(6))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(images)).mean((2, 3))))


def vgg() -> nn.Module:
    """A sequence of layers only, with an expansion that is flattened into a linear layer."""
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 9, 3, padding=1),
        nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(9, 7, 3), nn.BatchNorm2d(7),
        nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(7 * 4, 10), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(10, 5),
    )  # fmt: skip


# In so deep a network rounding grows from step to step, the faster the weights move.
SLOW = {"name": "sgd", "lr": 0.005, "momentum": 0.9}
SMALL = values(2, 8, 8, classes=5, rows=(10, 9, 4))
CLIPS = values(1, 3, 6, 6, classes=4, rows=(8, 11, 5))


def image(name, model_fn, note, **others):
    return Subject(name, model_fn, SMALL, cross_entropy, note, family="images", **others)


def deep(name, model_fn, note, rows=(10, 9, 4), **others):
    """16×16, so that norms of the last layers see more than one position: a norm over two numbers
    gives plus and minus one, and its gradient is what is left of rounding."""
    batch = values(2, 16, 16, classes=5, rows=rows)
    return Subject(name, model_fn, batch, cross_entropy, note, family="images", **others)


SUBJECTS = [
    deep("resnet18", resnet("batch", 18, "standard"), "batch norm over the whole batch"),
    deep(
        "resnet18-groups-of-3", resnet("batch", 18, "standard"),
        "batch norm over three examples", rows=(11, 9, 5), normalize_over=3,
    ),
    deep("resnet18-group-norm", resnet("group", 18, "standard"), "group norm", optimizer=CLIPPED),
    deep(
        "resnet18-depthwise", resnet("batch", 18, "depthwise_separable"),
        "depthwise convolutions, batch norm over four examples", rows=(11, 10, 6), normalize_over=4,
    ),
    deep(
        "resnet18-depthwise-group-norm", resnet("group", 18, "depthwise_separable"),
        "depthwise convolutions, group norm",
    ),
    deep("resnet101", resnet("group", 101, "standard"), "bottlenecks, 101 layers, group norm"),
    deep(
        "resnet101-depthwise", resnet("batch", 101, "depthwise_separable"),
        "101 layers, depthwise, batch norm over three", rows=(8, 9, 5), normalize_over=3,
        optimizer=SLOW,
    ),
    Subject(
        "u-net", UNet, maps(2, 8, classes=3, rows=(7, 5, 2)), cross_entropy,
        "skips from one end to the other, transposed convolution", ADAMW, family="images",
    ),
    Subject(
        "u-net-batch-norm", lambda: UNet(3, batch_norm=True),
        maps(2, 8, classes=3, rows=(10, 7, 4)), cross_entropy,
        "long skips, batch norm over two examples", normalize_over=2, family="images",
    ),
    image("densenet", DenseNet, "dense skips, batch norm over five", normalize_over=5),
    image("densenet-whole-batch", DenseNet, "dense skips, batch norm over the whole batch"),
    Subject(
        "video", VideoNet, CLIPS, cross_entropy,
        "3D and grouped convolutions, channel dropout, batch norm over three",
        normalize_over=3, family="images",
    ),
    image("mobilenet", MobileNet, "inverted residuals, squeeze and excite", optimizer=CLIPPED),
    image("convnext", ConvNeXt, "depthwise 7×7, channels last, layer scale", optimizer=ADAMW),
    image("vgg", vgg, "a sequence; flattened channels; batch norm of the whole batch"),
]  # fmt: skip
