"""A GPT for the benchmarks: 12 layers of 768 if nothing is said, tied weights, the next token.

As it is it has 85 million parameters in the blocks; the vocabulary is small, so that these are what
is measured.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and around a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        mixed = self.mix(self.before(x)).view(rows, length, 3, self.heads, -1)
        queries, keys, values = mixed.permute(2, 0, 3, 1, 4).unbind(0)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(rows, length, width))
        return x + self.narrow(functional.gelu(self.widen(self.between(x))))


class Gpt(nn.Module):
    """Token ids [N, L] to (logits [N, L, V], ids): the loss is that of the next id."""

    def __init__(self, vocab: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)
        self.tokens.weight = self.head.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x))), ids


def build(
    vocab: int = 256,
    length: int = 128,
    width: int = 768,
    heads: int = 12,
    layers: int = 12,
    **_given: Any,
) -> nn.Module:
    return Gpt(vocab, length, width, heads, layers)


def next_token(outputs: tuple[Tensor, Tensor], _targets: Tensor) -> Tensor:
    """The mean over the examples."""
    logits, ids = outputs
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
