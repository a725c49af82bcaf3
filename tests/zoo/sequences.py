"""Networks for sequences, written by hand: a GPT, encoders with masks, recurrent and mixing ones.

GPT(words=17, width=12, heads=3, layers=2)(tokens)         # logits [n, length, words]
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.subject import (
    ADAMW,
    CLIPPED,
    Subject,
    cross_entropy,
    generator,
    padded_texts,
    rows_of,
    texts,
    token_loss,
    values,
)


class CausalAttention(nn.Module):
    """nanoGPT's: q, k, v from one weight; by hand with a dropout layer, or torch's fused one."""

    def __init__(self, width: int, heads: int, length: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused, self.rate = heads, fused, dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.attention_dropout, self.dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        mask = torch.tril(torch.ones(length, length, dtype=torch.bool))
        self.register_buffer("mask", mask[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.size()
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (
            part.view(n, length, self.heads, width // self.heads).transpose(1, 2)
            for part in (q, k, v)
        )
        if self.fused:
            rate = self.rate if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) / math.sqrt(k.size(-1))
            scores = scores.masked_fill(~self.mask[:, :, :length, :length], -math.inf)
            y = self.attention_dropout(F.softmax(scores, dim=-1)) @ v
        y = y.transpose(1, 2).contiguous().view(n, length, width)
        return self.dropout(self.c_proj(y))


class GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int, length: int, dropout: float, fused: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalAttention(width, heads, length, dropout, fused)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A decoder whose head is its embedding."""

    def __init__(
        self, words: int = 17, width: int = 12, heads: int = 3, layers: int = 4,
        length: int = 6, dropout: float = 0.1, fused: bool = False, tied: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.wte, self.wpe = nn.Embedding(words, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(
            GPTBlock(width, heads, length, dropout, fused) for _ in range(layers)
        )
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)
        if tied:
            self.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Encoder(nn.Module):
    """Post-norm attention over the tokens that are there; the mean over these is classified."""

    def __init__(self, words: int = 19, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.register_buffer("positions", torch.randn(1, 8, width) * 0.1)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 15), nn.Linear(15, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, 4)

    def heads_of(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions[:, : tokens.shape[1]]
        q, k, v = (self.heads_of(make(x)) for make in (self.query, self.key, self.value))
        added = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        x = self.norms[0](x + self.dropout(self.out(seen.transpose(1, 2).flatten(2))))
        x = self.norms[1](x + self.dropout(self.down(F.relu(self.up(x)))))
        weights = mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * weights).sum(1) / weights.sum(1).clamp(min=1))


class TorchEncoder(nn.Module):
    """The layers of torch.nn, with a padding mask."""

    def __init__(self, words: int = 19, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 4)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.encoder(self.embed(tokens), src_key_padding_mask=mask == 0)
        return self.head(x[:, 0])


class Latents(nn.Module):
    """Learned queries that read a sequence through `nn.MultiheadAttention`, then each other."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.project = nn.Linear(5, width)
        self.latents = nn.Parameter(torch.randn(3, width) * 0.5)
        self.read = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mix = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(3 * width, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.project(inputs)
        queries = self.latents.expand(len(x), -1, -1)
        read, _ = self.read(queries, x, x, need_weights=False)
        read = self.norm(read + queries)
        mixed, _ = self.mix(read, read, read, need_weights=False)
        return self.head((read + mixed).flatten(1))


class Recurrent(nn.Module):
    """Two layers of LSTM one way, a GRU the other; every token is labelled."""

    def __init__(self, words: int = 17) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 6)
        self.lstm = nn.LSTM(6, 7, num_layers=2, batch_first=True)
        self.gru = nn.GRU(7, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, words)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(tokens))
        states, _ = self.gru(states)
        return self.head(states)


class Mixer(nn.Module):
    """Perceptrons over positions and over channels in turn."""

    def __init__(self, positions: int = 6, width: int = 7, layers: int = 3) -> None:
        super().__init__()
        self.start = nn.Linear(5, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "up1": nn.Linear(positions, 9), "down1": nn.Linear(9, positions),
                    "norm2": nn.LayerNorm(width),
                    "up2": nn.Linear(width, 11), "down2": nn.Linear(11, width),
                }
            )
            for _ in range(layers)
        )  # fmt: skip
        self.head = nn.Linear(width, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.start(inputs)
        for layer in self.layers:
            across = layer["norm1"](x).transpose(1, 2)
            x = x + layer["down1"](F.gelu(layer["up1"](across))).transpose(1, 2)
            x = x + layer["down2"](F.gelu(layer["up2"](layer["norm2"](x))))
        return self.head(x.mean(1))


class Gated(nn.Module):
    """A decoder in the newer style: grouped queries, rotary positions, RMS norm, gated layers."""

    def __init__(self, words: int = 17, width: int = 12, heads: int = 6, shared: int = 2) -> None:
        super().__init__()
        self.heads, self.shared, self.each = heads, shared, width // heads
        self.embed = nn.Embedding(words, width)
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(5))
        self.q = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.kv = nn.ModuleList(
            nn.Linear(width, 2 * shared * self.each, bias=False) for _ in range(2)
        )
        self.out = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.gate_up = nn.ModuleList(nn.Linear(width, 2 * 14, bias=False) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(14, width, bias=False) for _ in range(2))
        self.head = nn.Linear(width, words, bias=False)

    def turned(self, x: Tensor) -> Tensor:
        """Rotary positions: pairs of channels turn with their place in the sequence."""
        place = torch.arange(x.shape[2], device=x.device, dtype=x.dtype)
        angle = place[:, None] * torch.tensor([0.7], dtype=x.dtype, device=x.device)
        first, second = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def attend(self, layer: int, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q[layer](x).view(n, length, self.heads, self.each).transpose(1, 2)
        k, v = self.kv[layer](x).view(n, length, 2 * self.shared, -1).transpose(1, 2).chunk(2, 1)
        q, k = self.turned(q), self.turned(k)
        k, v = (part.repeat_interleave(self.heads // self.shared, dim=1) for part in (k, v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out[layer](seen.transpose(1, 2).reshape(n, length, -1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in range(2):
            x = x + self.attend(layer, self.norms[2 * layer](x))
            gate, up = self.gate_up[layer](self.norms[2 * layer + 1](x)).chunk(2, dim=-1)
            x = x + self.down[layer](F.silu(gate) * up)
        return self.head(self.norms[4](x))


def translated(step: int):
    """(source ids, target ids), and the next target ids, in different lengths."""
    made, n = generator(step), rows_of((7, 9, 3), step)
    source = torch.randint(13, (n, 7), generator=made)
    target = torch.randint(13, (n, 5), generator=made)
    return (source, target), target.roll(-1, 1)


class Translator(nn.Module):
    """`nn.Transformer`, both halves, with one embedding for both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.body = nn.Transformer(8, 2, 1, 1, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 13)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        length = target.shape[1]
        later = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        states = self.body(self.embed(source), self.embed(target), tgt_mask=later)
        return self.head(states)


WORDS = texts(6, words=17, rows=(9, 7, 2))
PADDED = padded_texts(7, words=19, classes=4, rows=(11, 10, 3))
SERIES = values(6, 5, classes=4, rows=(10, 7, 3))


def text(name, model_fn, note, optimizer=ADAMW, **others):
    return Subject(name, model_fn, WORDS, token_loss, note, optimizer, family="sequences", **others)


SUBJECTS = [
    text("gpt", GPT, "tied embedding and head, dropout layers, fused q, k, v"),
    text("gpt-untied", lambda: GPT(tied=False, heads=4, dropout=0.0), "4 heads, no dropout"),
    text(
        "gpt-fused-attention", lambda: GPT(fused=True),
        "tied, dropout inside torch's fused attention",
    ),
    text("gated-decoder", Gated, "grouped queries, rotary, RMS norm, gate and up fused", CLIPPED),
    Subject(
        "encoder", Encoder, PADDED, cross_entropy,
        "padding mask, mean over tokens, dropout", family="sequences",
    ),
    Subject(
        "torch-encoder", TorchEncoder, PADDED, cross_entropy,
        "nn.TransformerEncoder with a padding mask", ADAMW, family="sequences",
    ),
    Subject(
        "translator", Translator, translated, token_loss,
        "nn.Transformer, two inputs of different lengths", family="sequences",
    ),
    Subject(
        "latents", Latents, SERIES, cross_entropy,
        "nn.MultiheadAttention, learned queries expanded over the batch", family="sequences",
    ),
    text("recurrent", Recurrent, "LSTM and GRU, both ways"),
    Subject(
        "mixer", Mixer, SERIES, cross_entropy,
        "linear layers over transposed positions", CLIPPED, family="sequences",
    ),
]  # fmt: skip
