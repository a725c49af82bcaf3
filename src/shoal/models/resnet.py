"""ResNets for images of any size: plain modules that know nothing of devices.

    image ── downscale ── stem ── layer1 ── layer2 ── layer3 ── layer4 ── mean ── fc
             1/k          1/4      1         1/2       1/2       1/2      over H, W
                          w        w         2w        4w        8w       channels (× 4: bottleneck)

    basic        3×3 ─ 3×3              ┐
    bottleneck   1×1 ─ 3×3 ─ 1×1 (×4)   ┴ + skip (1×1 where the shape changes) ─ ReLU

    model = ResNet(ResNetOptions(depth=101, classes=1000))     # 44,549,160 parameters

Sources: He et al. 2015 (arXiv 1512.03385), the stride of a bottleneck on its 3×3 convolution;
depthwise-separable convolutions as in Howard et al. 2017 (arXiv 1704.04861, section 3.1).
Names of parameters are torchvision's, so exported weights load there (``bn`` also where the norm is
a group norm).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import UsageError

Convolution = Literal["standard", "depthwise_separable"]
Stem = Literal["auto", "standard", "small"]
Norm = Literal["batch", "group"]

# The side, in pixels, under which the standard stem (which divides it by 4) leaves layer4 with
# less than 2×2 positions.
SMALLEST_FOR_STANDARD_STEM = 56

# What the last norm of a block with a skip starts at, so that a deep network starts near a shallow
# one. On digits (one seed, 5 epochs, SGD) 1, 0 and 0.2 gave 64, 91 and 93 % for a separable
# ResNet-50 and 89, 95 and 98 % for a standard one. 0 (Goyal et al. 2017, arXiv 1706.02677, section
# 5.1) would make most gradients of the first step exactly zero, where no comparison finds a fault.
SCALE_BEFORE_SKIP = 0.2


@dataclass(frozen=True)
class ResNetOptions:
    """What a ResNet is made of.

    ``image_size`` (pixels, before the downscale) only settles ``stem="auto"``: small under 56
    pixels after the downscale, standard from there on and where the size is not known.
    ``width`` is the number of channels of the stem. Raises UsageError for what does not exist.
    """

    depth: int = 18
    conv: Convolution = "standard"
    residual: bool = True
    input_downscale: int = 1
    stem: Stem = "auto"
    norm: Norm = "batch"
    width: int = 64
    classes: int = 1000
    in_channels: int = 3
    image_size: int | None = None

    def __post_init__(self) -> None:
        for key, allowed in _ALLOWED.items():
            given = getattr(self, key)
            if given not in allowed:
                choices = ", ".join(str(value) for value in allowed)
                raise UsageError(
                    f"resnet: {key} is {given!r}", hint=f"It must be one of {choices}."
                )
        for key in ("input_downscale", "width", "classes", "in_channels"):
            given = getattr(self, key)
            if given < 1:
                raise UsageError(f"resnet: {key} is {given}", hint="It must be 1 or more.")

    @property
    def small_stem(self) -> bool:
        """Whether the stem is 3×3 with stride 1 and without pooling."""
        if self.stem != "auto" or self.image_size is None:
            return self.stem == "small"
        return downscaled(self.image_size, self.input_downscale) < SMALLEST_FOR_STANDARD_STEM


def downscaled(size: int, factor: int) -> int:
    """The side in pixels of an image made ``factor`` times smaller: ceil(size / factor)."""
    return -(-size // factor)


class ResNet(nn.Module):
    """A ResNet classifier: float images [n, in_channels, H, W] to logits [n, classes]."""

    def __init__(self, options: ResNetOptions) -> None:
        super().__init__()
        self.input_downscale = options.input_downscale
        parts = _Parts(options.conv, options.norm, options.residual)
        width, small = options.width, options.small_stem
        self.conv1 = nn.Conv2d(
            options.in_channels,
            width,
            kernel_size=3 if small else 7,
            stride=1 if small else 2,
            padding=1 if small else 3,
            bias=False,
        )
        self.bn1 = parts.norm(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        block, depths = _LAYERS[options.depth]
        planes = [width * 2**index for index in range(4)]
        inputs = [width, *(count * block.expansion for count in planes)]
        layers = [
            _layer(block, inputs[index], planes[index], blocks, min(index, 1) + 1, parts)
            for index, blocks in enumerate(depths)
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.fc = nn.Linear(inputs[-1], options.classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, in_channels, H, W]; n may be 0."""
        x = downscale(images, self.input_downscale)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def downscale(images: Tensor, factor: int) -> Tensor:
    """Images [n, c, H, W] made ``factor`` times smaller, antialiased, to ceil(H/f) × ceil(W/f).

    Bilinear with a triangle as wide as the pixels of the result, so that detail too fine for them
    is averaged away instead of turning into false patterns.
    """
    if factor == 1:
        return images
    size = [downscaled(side, factor) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


@dataclass(frozen=True)
class _Parts:
    """How the blocks of one network are made."""

    kind: Convolution
    norm_kind: Norm
    residual: bool

    def norm(self, channels: int) -> nn.BatchNorm2d | nn.GroupNorm:
        if self.norm_kind == "batch":
            return nn.BatchNorm2d(channels)
        # 32 groups (Wu and He 2018), but never one channel a group: on a 1×1 map such a group is a
        # single number, and its normalised value is always 0.
        groups = math.gcd(32, channels)
        return nn.GroupNorm(groups if groups < channels else max(1, groups // 2), channels)

    def conv3x3(self, channels: int, planes: int, stride: int) -> nn.Module:
        if self.kind == "standard":
            return nn.Conv2d(channels, planes, 3, stride, padding=1, bias=False)
        return SeparableConv(channels, planes, stride, self.norm(channels))

    def shortcut(self, channels: int, planes: int, stride: int) -> nn.Module | None:
        """The projection where a block changes the shape; None where there is none to make."""
        if not self.residual or (stride == 1 and channels == planes):
            return None
        return nn.Sequential(conv1x1(channels, planes, stride), self.norm(planes))


def conv1x1(channels: int, planes: int, stride: int = 1) -> nn.Conv2d:
    """A convolution of single positions."""
    return nn.Conv2d(channels, planes, 1, stride, bias=False)


class SeparableConv(nn.Module):
    """A 3×3 convolution in two: 3×3 of each channel alone, norm, ReLU, then 1×1 across channels.

    9·C·K weights become 9·C + C·K (and the norm's 2·C) for C channels in and K out.
    """

    def __init__(self, channels: int, planes: int, stride: int, norm: nn.Module) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels, channels, 3, stride, padding=1, groups=channels, bias=False
        )
        self.bn = norm
        self.relu = nn.ReLU()
        self.pointwise = conv1x1(channels, planes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, H, W] to [n, planes, ceil(H/stride), ceil(W/stride)]."""
        out: Tensor = self.pointwise(self.relu(self.bn(self.depthwise(x))))
        return out


class _Block(nn.Module):
    """What both kinds of block share: relu(body(x) + skip(x)); no skip without residual."""

    expansion: ClassVar[int]

    def __init__(self, channels: int, planes: int, stride: int, parts: _Parts) -> None:
        super().__init__()
        self.residual = parts.residual
        self.relu = nn.ReLU()
        self._make_body(channels, planes, stride, parts)
        self.downsample = parts.shortcut(channels, planes * self.expansion, stride)

    def _make_body(self, channels: int, planes: int, stride: int, parts: _Parts) -> None:
        raise NotImplementedError

    def body(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def last_norm(self) -> nn.BatchNorm2d | nn.GroupNorm:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        if self.residual:
            out = out + (x if self.downsample is None else self.downsample(x))
        activated: Tensor = self.relu(out)
        return activated


class BasicBlock(_Block):
    """Two 3×3 convolutions: the block of ResNet-18 and 34."""

    expansion = 1

    def _make_body(self, channels: int, planes: int, stride: int, parts: _Parts) -> None:
        self.conv1 = parts.conv3x3(channels, planes, stride)
        self.bn1 = parts.norm(planes)
        self.conv2 = parts.conv3x3(planes, planes, 1)
        self.bn2 = parts.norm(planes)

    def body(self, x: Tensor) -> Tensor:
        """The block without its skip."""
        x = self.relu(self.bn1(self.conv1(x)))
        out: Tensor = self.bn2(self.conv2(x))
        return out

    @property
    def last_norm(self) -> nn.BatchNorm2d | nn.GroupNorm:
        """The norm before the skip is added."""
        return self.bn2


class Bottleneck(_Block):
    """1×1 to fewer channels, 3×3, 1×1 to four times as many: ResNet-50 and deeper."""

    expansion = 4

    def _make_body(self, channels: int, planes: int, stride: int, parts: _Parts) -> None:
        self.conv1 = conv1x1(channels, planes)
        self.bn1 = parts.norm(planes)
        self.conv2 = parts.conv3x3(planes, planes, stride)
        self.bn2 = parts.norm(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = parts.norm(planes * self.expansion)

    def body(self, x: Tensor) -> Tensor:
        """The block without its skip."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.bn3(self.conv3(x))
        return out

    @property
    def last_norm(self) -> nn.BatchNorm2d | nn.GroupNorm:
        """The norm before the skip is added."""
        return self.bn3


def _layer(
    block: type[_Block], channels: int, planes: int, blocks: int, stride: int, parts: _Parts
) -> nn.Sequential:
    first = block(channels, planes, stride, parts)
    rest = [block(planes * block.expansion, planes, 1, parts) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    """He initialisation (arXiv 1502.01852): N(0, 2 / fan-out), fan-out within a channel's group.

    Norms start at 1 and 0, the one before a skip at `SCALE_BEFORE_SKIP`; ``fc`` as torch makes it.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels // module.groups * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        elif isinstance(module, _Block) and module.residual:
            nn.init.constant_(module.last_norm.weight, SCALE_BEFORE_SKIP)


_LAYERS: dict[int, tuple[type[_Block], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}

_ALLOWED: dict[str, tuple[object, ...]] = {
    "depth": tuple(_LAYERS),
    "conv": ("standard", "depthwise_separable"),
    "stem": ("auto", "standard", "small"),
    "norm": ("batch", "group"),
}
