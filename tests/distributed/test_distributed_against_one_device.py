"""Training split over 2, 3 and 4 ranks beside a plain loop on one device, in float64.

50 examples on 3 ranks are 17 + 17 + 16; the last batch of an epoch leaves a rank of 4 with none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from onedevice import (
    Case,
    adamw,
    assembled,
    batches_of,
    compare,
    images,
    trace_job,
    train_plainly,
    train_split,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shoal.learn.objectives import CrossEntropy, UsersObjective
from shoal.learn.optimizers import build_optimizer
from shoal.models import ResNet, ResNetOptions, Transformer, TransformerOptions, mlp
from shoal.recipe.component import read

TOLERANCE = 1e-10


def small(**options: Any) -> Case:
    """A perceptron on images: 50, 50 and 3 examples, then 50 of the next epoch."""
    plain = {"build": lambda: mlp(256, 5, [16, 16]), "batches": batches_of(*images(103), 50, 4)}
    return Case(**{**plain, **options})


def resnet(**options: Any) -> Callable[[], nn.Module]:
    shape = {"width": 4, "classes": 5, "in_channels": 1, "image_size": 16, **options}
    return lambda: ResNet(ResNetOptions(**shape))


def transformer() -> nn.Module:
    shape = {"classes": 5, "length": 16, "features": 16, "width": 16, "heads": 2, "layers": 2}
    return Transformer(TransformerOptions(**shape))


# ---- losses over tokens


def token_model() -> nn.Module:
    return nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12))


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=-1)


def masked_tokens() -> Case:
    """Sequences with very different numbers of tokens that count; the last third has none."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 12, (53, 7), generator=generator)
    counted = torch.arange(7)[None, :] < torch.arange(53)[:, None] % 8
    targets = torch.where(counted, ids.roll(1, 1), -1)
    targets[34:50] = -1
    return small(
        build=token_model,
        batches=batches_of(ids, targets, 50, 4),
        loss=token_loss,
        objective=CrossEntropy(ignore_index=-1),
    )


# ---- outputs that are no tensor


@dataclass
class Answer:
    logits: Tensor
    size: Tensor


class Answering(nn.Module):
    """Returns its logits, and the size of its features, as `form` puts them together."""

    def __init__(self, form: Callable[..., Any]) -> None:
        super().__init__()
        self.features, self.head, self.form = mlp(256, 8, [16]), nn.Linear(8, 5), form

    def forward(self, images: Tensor) -> Any:
        features = self.features(images)
        return self.form(self.head(features), features.square().mean(1))


def answer_loss(outputs: Any, targets: Tensor) -> Tensor:
    """A user's own loss: a mean over the examples."""
    if isinstance(outputs, Answer):
        logits, size = outputs.logits, outputs.size
    else:
        logits, size = outputs.values() if isinstance(outputs, dict) else outputs
    return nn.functional.cross_entropy(logits, targets) + 0.1 * size.mean()


def answering(form: Callable[..., Any]) -> Case:
    return small(
        build=lambda: Answering(form),
        loss=answer_loss,
        objective=UsersObjective("answer_loss", answer_loss),
    )


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = mlp(256, 5, [8]), nn.Linear(3, 5)

    def forward(self, images: Tensor, more: Tensor) -> Tensor:
        return self.left(images) + self.right(more)


def two_inputs() -> Case:
    inputs, targets = images(53)
    more = torch.randn(53, 3, generator=torch.Generator().manual_seed(1))
    return small(build=TwoInputs, batches=batches_of((inputs, more), targets, 50, 3))


class NeedsRows(nn.Module):
    """Cannot be called with no rows, as many models cannot; a rank may have none."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lstm, self.head = (
            nn.BatchNorm1d(256),
            nn.LSTM(16, 8, batch_first=True),
            nn.Linear(8, 5),
        )

    def forward(self, images: Tensor) -> Tensor:
        rows = self.norm(images.view(len(images), -1)) + 0.0 * images.max()
        return self.head(self.lstm(rows.view(-1, 16, 16))[0][:, -1])


def needs_rows() -> Case:
    def objective(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        assert len(targets)
        return nn.functional.cross_entropy(outputs, targets, reduction="sum"), len(targets)

    return small(build=NeedsRows, objective=UsersObjective("objective", objective))


# ---- parameters that are not all used


class Branches(nn.Module):
    """One layer is never used; one only for some examples, in some steps, on some ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.never, self.rare = mlp(256, 8, [16]), nn.Linear(4, 4), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        chosen = images[:, 0, 0, 0] > 2.5
        if bool(chosen.any()):
            features = features + chosen[:, None] * self.rare(features)
        return self.head(features)


def branches() -> Case:
    inputs, targets = images(103)
    inputs[:, 0, 0, 0] = 0.0
    inputs[49, 0, 0, 0] = 3.0  # the first step, and there the last rank alone
    return small(build=Branches, batches=batches_of(inputs, targets, 50, 4))


def frozen_start() -> nn.Module:
    model = mlp(256, 5, [16, 16])
    model[1].requires_grad_(False)
    return model


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(ids))))


def tied() -> Case:
    return Case(**{**vars(masked_tokens()), "build": Tied})


def no_decay(model: nn.Module) -> torch.optim.Optimizer:
    options = {"name": "adamw", "lr": 0.01, "weight_decay": 0.5, "no_decay": ["bias", "norm"]}
    return build_optimizer(read("optimizer", options), model)


def no_decay_by_hand(model: nn.Module) -> torch.optim.Optimizer:
    plain = [p for p in model.parameters() if p.ndim > 1]
    other = [{"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW([{"params": plain}, *other], lr=0.01, weight_decay=0.5, fused=True)


CASES: dict[str, tuple[Callable[[], Case], tuple[int, ...]]] = {
    "mlp, adamw": (lambda: small(optimizer=adamw), (2, 3, 4)),
    "mlp, clipped": (lambda: small(clip_norm=0.1), (2, 3, 4)),
    "resnet": (lambda: small(build=resnet()), (2, 3, 4)),
    "resnet, separable": (lambda: small(build=resnet(conv="depthwise_separable")), (3,)),
    "resnet, group norm": (lambda: small(build=resnet(norm="group"), optimizer=adamw), (4,)),
    "transformer": (lambda: small(build=transformer), (2, 3, 4)),
    "masked tokens": (masked_tokens, (2, 3, 4)),
    "outputs in a tuple": (lambda: answering(lambda *both: both), (2,)),
    "outputs in a dict": (lambda: answering(lambda a, b: {"logits": a, "size": b}), (4,)),
    "outputs in a dataclass": (lambda: answering(Answer), (4,)),
    "two inputs": (two_inputs, (3,)),
    "a model that needs rows": (needs_rows, (4,)),
    "unused parameters": (branches, (2, 3, 4)),
    "frozen parameters": (lambda: small(build=frozen_start), (3,)),
    "tied weights": (tied, (3,)),
    "statistics over 16, the last a partial group": (
        lambda: small(build=resnet(), normalize_over=16),
        (4,),
    ),
}


@pytest.mark.parametrize(
    ("name", "ranks"), [(name, ranks) for name, (_, counts) in CASES.items() for ranks in counts]
)
def test_training_on_ranks_is_training_on_one_device(
    pool: Any, name: str, ranks: int, tmp_path: Path
) -> None:
    case = CASES[name][0]()
    errors = compare(train_plainly(case), train_split(pool, ranks, case, tmp_path))
    assert max(errors.values()) <= TOLERANCE, errors


def _in_small_buckets(groups: Any, case: Case, folder: str) -> int:
    from shoal.sync import every_step

    whole, every_step.BUCKET_BYTES = every_step.BUCKET_BYTES, 64
    try:
        return _save_and_count(groups, case, folder)
    finally:
        every_step.BUCKET_BYTES = whole


def _save_and_count(groups: Any, case: Case, folder: str) -> int:
    save_file(trace_job(groups, case), Path(folder) / f"rank-{groups.world.rank}.safetensors")
    return len(assembled(groups, case).agreement._buckets)


@pytest.mark.parametrize("name", ["mlp, adamw", "unused parameters", "tied weights"])
def test_many_buckets_are_as_good_as_one(pool: Any, name: str, tmp_path: Path) -> None:
    case = CASES[name][0]()
    counts = pool.run(_in_small_buckets, case, str(tmp_path), ranks=3)
    assert min(counts) > 2
    traces = [load_file(tmp_path / f"rank-{rank}.safetensors") for rank in range(3)]
    errors = compare(train_plainly(case), traces)
    assert max(errors.values()) <= TOLERANCE, errors


def test_what_is_not_to_decay_does_not(pool: Any, tmp_path: Path) -> None:
    case = small(build=resnet(), optimizer=no_decay_by_hand)
    ours = small(build=resnet(), optimizer=no_decay)
    errors = compare(train_plainly(case), train_split(pool, 2, ours, tmp_path))
    assert max(errors.values()) <= TOLERANCE, errors
