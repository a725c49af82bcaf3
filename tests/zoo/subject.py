"""`Subject`: a model of the zoo with what it is trained on.

    subject = Subject("mlp", build, features(13, rows=(11, 10, 4)), cross_entropy)
    subject.model_fn(), subject.batch_fn(0)

A subject knows nothing of Shoal: functions of plain torch, and an optimizer as a recipe writes it.
Batches are functions of the step, in float32, of sizes that nothing divides.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SGD = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
ADAMW = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.01}
CLIPPED = {"name": "adamw", "lr": 1e-2, "clip_norm": 0.5, "no_decay": ["bias", "norm"]}

Batch = tuple[Any, Any]  # inputs, targets


@dataclass(frozen=True)
class Subject:
    """One row of the coverage table.

    ``note`` says what is special about it. ``waits_for`` names what this version cannot do yet
    although it neither refuses nor says so: such a row is known to be wrong, and shown as wrong.
    """

    name: str
    model_fn: Callable[[], nn.Module]
    batch_fn: Callable[[int], Batch]
    loss_fn: Callable[[Any, Any], Any]
    note: str
    optimizer: Mapping[str, Any] = field(default_factory=lambda: SGD)
    normalize_over: int | None = None
    family: str = "plain"
    waits_for: str | None = None


def generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + step)


def rows_of(rows: tuple[int, ...], step: int) -> int:
    """The size of a step's batch; from the last on they stay as they are."""
    return rows[min(step, len(rows) - 1)]


def values(*shape: int, classes: int, rows: tuple[int, ...]) -> Callable[[int], Batch]:
    """Normal inputs ``[n, *shape]`` away from zero, and a class for each example."""

    def batch(step: int) -> Batch:
        made, n = generator(step), rows_of(rows, step)
        inputs = torch.randn(n, *shape, generator=made) + 0.5
        return inputs, torch.randint(classes, (n,), generator=made)

    return batch


def maps(
    channels: int, side: int, *, classes: int, rows: tuple[int, ...]
) -> Callable[[int], Batch]:
    """Images ``[n, channels, side, side]`` with a class for each pixel."""

    def batch(step: int) -> Batch:
        made, n = generator(step), rows_of(rows, step)
        images = torch.randn(n, channels, side, side, generator=made)
        return images, torch.randint(classes, (n, side, side), generator=made)

    return batch


def texts(length: int, *, words: int, rows: tuple[int, ...]) -> Callable[[int], Batch]:
    """Token ids ``[n, length]``; the targets are the next ones, some of them masked (-100)."""

    def batch(step: int) -> Batch:
        made, n = generator(step), rows_of(rows, step)
        tokens = torch.randint(words, (n, length + 1), generator=made)
        targets = tokens[:, 1:].clone()
        lengths = torch.randint(1, length + 1, (n, 1), generator=made)
        targets[torch.arange(length) >= lengths] = -100
        return tokens[:, :-1].contiguous(), targets

    return batch


def padded_texts(
    length: int, *, words: int, classes: int, rows: tuple[int, ...]
) -> Callable[[int], Batch]:
    """(token ids ``[n, length]``, mask with 1 where there is a token), and a class for each."""

    def batch(step: int) -> Batch:
        made, n = generator(step), rows_of(rows, step)
        tokens = torch.randint(1, words, (n, length), generator=made)
        lengths = torch.randint(2, length + 1, (n, 1), generator=made)
        mask = (torch.arange(length) < lengths).long()
        return (tokens * mask, mask), torch.randint(classes, (n,), generator=made)

    return batch


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """A mean over examples."""
    return F.cross_entropy(outputs, targets)


def token_loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) over the tokens that are not masked; outputs ``[n, length, words]``."""
    total = F.cross_entropy(
        outputs.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return total, (targets != -100).sum()


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean square of what is left after one-hot targets are taken away: a smooth loss."""
    wanted = F.one_hot(targets, outputs.shape[-1]).to(outputs.dtype)
    return (outputs - wanted).square().sum(-1).mean()
