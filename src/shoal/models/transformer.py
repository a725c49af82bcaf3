"""A transformer encoder that classifies sequences: of token ids, or of vectors.

    ids [n, L]      ─ embedding ─┐
    vectors [n, L, f] ─ linear ──┴ + positions ─ block × layers ─ norm ─ mean over L ─ head
    images [n, c, H, W] are read row by row: L = H, f = c·W

    block    x + attention(norm(x)), then x + mlp(norm(x))                    (pre-norm)

    model = Transformer(TransformerOptions(classes=2, vocab=1000, length=64))

Sources: Vaswani et al. 2017 (arXiv 1706.03762); pre-norm: Xiong et al. 2020 (arXiv 2002.04745).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import BadExample, UsageError

LONGEST_PLAIN = 256  # positions; a matrix of scores costs memory with their square


@dataclass(frozen=True)
class TransformerOptions:
    """What a transformer is made of.

    Exactly one of ``vocab`` (number of token ids) and ``features`` (length of an input vector).
    ``length`` is that of the longest sequence; ``pad_id`` a token that is neither attended to nor
    pooled. Raises UsageError for numbers that do not fit together.
    """

    classes: int
    length: int
    vocab: int | None = None
    features: int | None = None
    width: int = 256
    heads: int = 4
    layers: int = 4
    dropout: float = 0.0
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if (self.vocab is None) == (self.features is None):
            raise UsageError(
                f"transformer: vocab is {self.vocab} and features is {self.features}",
                hint="Give one of them: vocab for token ids, features for vectors.",
            )
        if self.width % self.heads:
            raise UsageError(
                f"transformer: width {self.width} cannot be cut into {self.heads} heads",
                hint=f"Make it a multiple of {self.heads}.",
            )
        if self.pad_id is not None and self.vocab is None:
            raise UsageError(
                "transformer: pad_id needs token ids", hint="Give vocab, not features."
            )


class Transformer(nn.Module):
    """An encoder with a head: sequences of at most ``length`` positions to logits [n, classes]."""

    def __init__(self, options: TransformerOptions) -> None:
        super().__init__()
        self.length, self.pad_id = options.length, options.pad_id
        self.embed: nn.Module
        if options.vocab is not None:
            self.embed = nn.Embedding(options.vocab, options.width)
            nn.init.normal_(self.embed.weight, std=0.02)
        elif options.features is not None:
            self.embed = nn.Linear(options.features, options.width)
        self.takes_tokens = options.vocab is not None
        self.positions = nn.Parameter(torch.empty(options.length, options.width))
        nn.init.normal_(self.positions, std=0.02)
        self.dropout = nn.Dropout(options.dropout)
        self.blocks = nn.ModuleList(
            Block(options.width, options.heads, options.dropout) for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, options.classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [n, classes] of ids [n, L], vectors [n, L, features] or images [n, c, H, W].

        Raises BadExample for a sequence longer than ``length``.
        """
        if not self.takes_tokens and inputs.dim() == 4:
            inputs = inputs.transpose(1, 2).flatten(2)
        positions = inputs.shape[1]
        if positions > self.length:
            raise BadExample(
                f"a sequence of {positions} positions; the model has {self.length}",
                hint="Raise model.length, or cut the sequences.",
            )
        keep = None if self.pad_id is None else inputs != self.pad_id
        x = self.dropout(self.embed(inputs) + self.positions[:positions])
        for block in self.blocks:
            x = block(x, keep)
        logits: Tensor = self.head(mean_over_positions(self.norm(x), keep))
        return logits


def mean_over_positions(x: Tensor, keep: Tensor | None) -> Tensor:
    """The mean [n, width] of x [n, L, width] over the positions kept; 0 where none is."""
    if keep is None:
        return x.mean(1)
    kept = keep.unsqueeze(-1)
    return x.masked_fill(~kept, 0.0).sum(1) / kept.sum(1).clamp(min=1)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and beside a skip."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x [n, L, width] to the same shape; ``keep`` [n, L] says which positions are real."""
        x = x + self.dropout1(self.attention(self.norm1(x), keep))
        out: Tensor = x + self.dropout2(self.contract(F.gelu(self.expand(self.norm2(x)))))
        return out


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q·kᵀ / √d)·v of [n, heads, L, d] each; only positions where ``mask`` are seen.

    torch's fused kernel, but for short sequences in bf16 on the CPU: its backward pass there takes
    twice the time of plain products (21.7 and 11.2 ms for 32 × 4 × 64 × 64 on one core with
    AVX512-BF16, forward and backward).
    """
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if not plain or query.shape[-2] > LONGEST_PLAIN:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        # Not −∞: a row in which no position is seen would be NaN.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    mixed: Tensor = scores.softmax(-1) @ value
    return mixed


class Attention(nn.Module):
    """Multi-head attention of every position to every kept position.

    softmax(q·kᵀ / √d)·v in each head. Adding one vector to all keys adds one number to a row of
    scores, which the softmax takes away again: the true gradient of ``key.bias`` is zero.
    Attention weights are not dropped out: every random choice is an ``nn.Dropout`` module, which
    can be replaced from outside by one that does not depend on how the batch is split.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x [n, L, width] to the same shape; only positions where ``keep`` [n, L] are seen."""
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mask = None if keep is None else keep[:, None, None, :]
        mixed = attend(query, key, value, mask)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out
