"""Models of many kinds in their smallest size, for tensor parallelism."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.models.resnet import ResNet, ResNetOptions
from shoal.models.transformer import Transformer, TransformerOptions

Case = tuple[nn.Module, tuple[Tensor, ...]]


class Mlp(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class GptAttention(nn.Module):
    def __init__(self, width: int, heads: int, places: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads = heads
        self.register_buffer("mask", torch.ones(places, places).tril()[None, None])

    def forward(self, x: Tensor) -> Tensor:
        n, places, width = x.shape
        parts = self.c_attn(x).split(width, dim=2)
        q, k, v = (p.view(n, places, self.heads, -1).transpose(1, 2) for p in parts)
        scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(self.mask[:, :, :places, :places] == 0, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).contiguous().view(n, places, width)
        return self.c_proj(y)


class GptBlock(nn.Module):
    def __init__(self, width: int, heads: int, places: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = GptAttention(width, heads, places)
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class Gpt(nn.Module):
    """Fused q, k, v; the head is the embedding; 37 words divide by no number of ranks."""

    def __init__(self, words: int = 37, width: int = 24, heads: int = 4, places: int = 8) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(places, width)
        self.h = nn.ModuleList(GptBlock(width, heads, places) for _ in range(2))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class RmsNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class LlamaBlock(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, how: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.depth, self.how = heads, kv_heads, width // heads, how
        self.norm, self.norm_2 = RmsNorm(width), RmsNorm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.depth, bias=False)
        self.v = nn.Linear(width, kv_heads * self.depth, bias=False)
        self.gate, self.up = nn.Linear(width, 50, bias=False), nn.Linear(width, 50, bias=False)
        self.down = nn.Linear(50, width, bias=False)

    def rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        half = self.depth // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * angles.cos() + turned * angles.sin()

    def repeated(self, x: Tensor) -> Tensor:
        times = self.heads // self.kv_heads
        n, heads, places, depth = x.shape
        if self.how == "repeat_interleave":
            return x.repeat_interleave(times, 1)
        if self.how == "tiled":
            return x.repeat(1, times, 1, 1)
        shape = (n, heads, times, places, depth)
        return x[:, :, None].expand(shape).reshape(n, heads * times, places, depth)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        n, places, width = x.shape
        y = self.norm(x)
        q, k, v = (
            layer(y).view(n, places, -1, self.depth).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        q, k = self.rotated(q, angles), self.rotated(k, angles)
        fused = self.how == "enable_gqa"
        if not fused:
            k, v = self.repeated(k), self.repeated(v)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=fused)
        x = x + self.o(a.transpose(1, 2).reshape(n, places, width))
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, how: str, words: int = 41, kv_heads: int = 2) -> None:
        super().__init__()
        width, heads = 24, 6
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, kv_heads, how) for _ in range(2))
        self.norm, self.head = RmsNorm(width), nn.Linear(width, words, bias=False)
        rate = 1 / 100 ** (torch.arange(0, width // heads, 2) / (width // heads))
        angles = torch.outer(torch.arange(16.0), rate)
        self.register_buffer("angles", torch.cat([angles, angles], -1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, self.angles[: ids.size(1)])
        return self.head(self.norm(x))


class VitAttention(nn.Module):
    """One weight for q, k, v in one of the orders that are met, and a bias for each head."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.qkv, self.proj, self.order = nn.Linear(20, 60), nn.Linear(20, 20), order
        self.bias = nn.Parameter(torch.randn(5, 7, 7))

    def forward(self, x: Tensor) -> Tensor:
        n, places, width = x.shape
        fused = self.qkv(x)
        if self.order == "heads last":
            q, k, v = fused.reshape(n, places, 3, 5, 4).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.order == "heads first":
            q, k, v = fused.view(n, places, 5, 3, 4).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = fused.view(n, places, 5, 12).transpose(1, 2).chunk(3, -1)
        weights = (torch.einsum("bhid,bhjd->bhij", q * 0.5, k) + self.bias).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, places, width))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.down_2, self.middle = twice(3, 8), twice(8, 12), twice(12, 20)
        self.up_2, self.join_2 = nn.ConvTranspose2d(20, 12, 2, 2), twice(24, 12)
        self.up, self.join = nn.ConvTranspose2d(12, 8, 2, 2), twice(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        b = self.down_2(F.max_pool2d(a, 2))
        y = self.up_2(self.middle(F.max_pool2d(b, 2)))
        y = self.up(self.join_2(torch.cat([b, y], 1)))
        return self.out(self.join(torch.cat([a, y], 1)))


def twice(channels: int, planes: int) -> nn.Sequential:
    def layers(inputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, planes, 3, padding=1), nn.BatchNorm2d(planes), nn.ReLU(True)]

    return nn.Sequential(*layers(channels), *layers(planes))


class DenseNet(nn.Module):
    def __init__(self, growth: int = 5) -> None:
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 7, 3, padding=1), nn.ModuleList()
        for at in range(3):
            channels = 7 + at * growth
            first = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4 * growth, 1)]
            last = [nn.BatchNorm2d(4 * growth), nn.ReLU()]
            conv = nn.Conv2d(4 * growth, growth, 3, padding=1)
            self.layers.append(nn.Sequential(*first, *last, conv))
        self.norm, self.head = nn.BatchNorm2d(7 + 3 * growth), nn.Linear(7 + 3 * growth, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return self.head(self.norm(torch.cat(features, 1)).relu().mean((2, 3)))


class Groups(nn.Module):
    """Grouped convolution, squeeze and excitation, depthwise with PReLU, a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 20, 1)
        self.norm = nn.GroupNorm(4, 20)
        self.grouped, self.narrow = nn.Conv2d(20, 20, 3, padding=1, groups=4), nn.Conv2d(20, 10, 1)
        self.squeeze, self.excite = nn.Linear(20, 4), nn.Linear(4, 20)
        self.depthwise, self.slope = nn.Conv2d(10, 20, 3, groups=10, padding=1), nn.PReLU(20)
        self.point, self.head = nn.Conv2d(20, 10, 1), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.grouped(self.norm(self.wide(x)).relu())
        scale = self.excite(self.squeeze(y.mean((2, 3))).relu()).sigmoid()
        x = x + self.narrow(y * scale[:, :, None, None])
        n, channels, height, width = x.shape
        x = x.view(n, 2, 5, height, width).transpose(1, 2).reshape(n, channels, height, width)
        return self.head((x + self.point(self.slope(self.depthwise(x)))).mean((-1, -2)))


class Gated(nn.Module):
    """Halves by chunk, by glu and by slices; a trained number times a part."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.back = nn.Linear(8, 46), nn.Linear(23, 8)
        self.fused_2, self.back_2 = nn.Linear(8, 30), nn.Linear(15, 8)
        self.fused_3, self.back_3 = nn.Linear(8, 20), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.fused(x).chunk(2, -1)
        x = x + self.back(F.silu(gate) * up * self.scale)
        x = x + self.back_2(F.glu(self.fused_2(x), -1))
        h = self.fused_3(x)
        return x + self.back_3(h[:, :8] * h[:, 12:].sigmoid())


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6)
        self.second, self.norm_2 = nn.Conv3d(6, 9, 3, padding=1), nn.GroupNorm(3, 9)
        self.hidden, self.head = nn.Linear(72, 33), nn.Linear(33, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(self.norm(self.first(x)).relu(), 2)
        x = F.max_pool3d(self.norm_2(self.second(x)).relu(), 2)
        return self.head(self.hidden(x.flatten(1)).relu())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class SelfAttention(nn.Module):
    """torch's own, rows second, with the mean of its weights as a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(20, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1)
        return self.attention(x, x, x)


def ids(words: int, places: int = 8) -> tuple[Tensor, ...]:
    return (torch.randint(1, words, (3, places)),)


def resnet(depth: int, conv: str = "standard", norm: str = "batch") -> Case:
    options = ResNetOptions(depth, conv, width=8, classes=5, stem="small", norm=norm)
    return ResNet(options), (torch.randn(4, 3, 16, 16),)


def encoder() -> Case:
    options = TransformerOptions(5, 8, vocab=50, width=20, heads=5, layers=2, pad_id=0)
    return Transformer(options), ids(50)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": lambda: (Mlp(7, 30, 19, 30, 5), (torch.randn(4, 7),)),
    "resnet basic": lambda: resnet(18),
    "resnet depthwise": lambda: resnet(18, "depthwise_separable"),
    "resnet bottleneck": lambda: resnet(50),
    "resnet group norm": lambda: resnet(18, norm="group"),
    "unet": lambda: (UNet(), (torch.randn(3, 3, 8, 8),)),
    "densenet": lambda: (DenseNet(), (torch.randn(3, 3, 6, 6),)),
    "groups": lambda: (Groups(), (torch.randn(3, 3, 8, 8),)),
    "volume": lambda: (Volume(), (torch.randn(3, 1, 8, 8, 8),)),
    "gpt": lambda: (Gpt(), ids(37)),
    "llama expand": lambda: (Llama("expand"), ids(41)),
    "llama interleave": lambda: (Llama("repeat_interleave", kv_heads=3), ids(41)),
    "llama tiled": lambda: (Llama("tiled"), ids(41)),
    "llama gqa": lambda: (Llama("enable_gqa"), ids(41)),
    "gated": lambda: (Gated(), (torch.randn(3, 8),)),
    "vit, heads last": lambda: (VitAttention("heads last"), (torch.randn(3, 7, 20),)),
    "vit, heads first": lambda: (VitAttention("heads first"), (torch.randn(3, 7, 20),)),
    "vit, chunked": lambda: (VitAttention("chunked"), (torch.randn(3, 7, 20),)),
    "torch attention": lambda: (SelfAttention(), (torch.randn(3, 7, 20),)),
    "torch encoder": lambda: (
        nn.TransformerEncoderLayer(20, 5, 33, 0.0, batch_first=True),
        (torch.randn(3, 6, 20),),
    ),
    "shoal encoder": encoder,
    "lstm": lambda: (Recurrent(), (torch.randn(3, 5, 8),)),
}
WHOLE = {"lstm"}


def case(name: str) -> Case:
    """A model in float64 and its inputs, the same on every rank."""
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return model.double(), wide
