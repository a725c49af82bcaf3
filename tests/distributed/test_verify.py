"""`verify` finds what is wrong, names the cause, and does not cry wolf."""

import contextlib

import planted
import pytest
import torch
from torch import nn
from torch.nn import functional

from shoal.recipe import Recipe
from shoal.recipe.component import read
from shoal.verify.on_rank import Functions, VerifyTask, verify_on_rank

ADAMW = read("optimizer", {"name": "adamw", "lr": 1e-2})
SGD = read("optimizer", {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01})


def recipe(**changes):
    values = {
        "name": "small",
        "batch_size": 14,
        "steps": 5,
        "model": {"name": "resnet", "depth": 18, "width": 4, "stem": "small"},
        "data": {"train": "digits:train"},
        "objective": "cross_entropy",
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4},
    }
    return Recipe.from_dict(values | changes)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=True),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(6 * 36, 4),
    )


def images(step):
    made = torch.Generator().manual_seed(step)
    return torch.randn(9, 3, 8, 8, generator=made) + 1.5, torch.randint(4, (9,), generator=made)


class Tagger(nn.Module):
    """A transformer that labels each token; its key bias has a true gradient of zero."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens):
        return {"logits": self.head(self.encoder(self.embed(tokens)))}


def sentences(step):
    made = torch.Generator().manual_seed(step)
    tokens = torch.randint(11, (7, 6), generator=made)
    labels = torch.randint(5, (7, 6), generator=made)
    lengths = torch.randint(1, 7, (7,), generator=made)
    labels[torch.arange(6) >= lengths[:, None]] = -100
    return (tokens,), labels


def token_loss(outputs, labels):
    total = functional.cross_entropy(
        outputs["logits"].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return total, (labels != -100).sum()


CONV = Functions(conv_net, images, functional.cross_entropy, None, SGD)
TEXT = Functions(Tagger, sentences, token_loss, None, ADAMW)


def verify(pool, work, ranks, plant=contextlib.nullcontext):
    if isinstance(work, Recipe):
        work = work.to_dict()
    task = VerifyTask(work, f"dp{ranks}", 3, plant)
    return pool.call(verify_on_rank, task, ranks=ranks)[0]


def flat_token_loss(outputs, labels):
    return functional.cross_entropy(
        outputs, labels.flatten(), ignore_index=-100, reduction="sum"
    ), (labels != -100).sum()


class FlatTagger(Tagger):
    """Gives ``[examples · tokens, classes]``: several rows for each example."""

    def forward(self, tokens):
        return super().forward(tokens)["logits"].flatten(0, 1)


FLAT = Functions(FlatTagger, sentences, flat_token_loss, None, ADAMW)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("work", [CONV, TEXT], ids=["conv", "text"])
def test_functions_hold(pool, work, ranks):
    findings = verify(pool, work, ranks)
    assert findings["first_difference"] is None
    assert all(error <= 1e-10 for error in findings["max_error"].values() if error is not None)
    assert findings["max_error"]["gradient"] is not None


def test_outputs_with_several_rows_for_an_example_hold(pool):
    assert verify(pool, FLAT, 3)["first_difference"] is None


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        (3, {"normalize_over": 5}),
        (4, {"optimizer": {"name": "adamw", "clip_norm": 0.5, "no_decay": ["norm", "bias"]}}),
        (2, {"model": {"name": "resnet", "depth": 50, "width": 4, "conv": "depthwise_separable"}}),
        (3, {"model": {"name": "transformer", "features": 8, "length": 8, "width": 8, "heads": 2}}),
    ],
    ids=["batch", "groups-of-5", "adamw-clip", "bottleneck-separable", "transformer"],
)
def test_recipes_hold(pool, ranks, changes):
    findings = verify(pool, recipe(**changes), ranks)
    assert findings["first_difference"] is None, findings


GROUPS = recipe(normalize_over=5)

PLANTED = [
    (planted.gradients_not_summed, CONV, 2, "gradient", "not summed"),
    (planted.gradients_averaged, CONV, 3, "gradient", "averaged"),
    (planted.mean_of_means, CONV, 2, "loss", "mean of means"),
    (planted.tokens_weighted_as_examples, TEXT, 3, "loss", "weighted as examples"),
    (planted.statistics_not_synchronised, CONV, 3, "output", "not synchronised"),
    (planted.last_rows_dropped, CONV, 2, "output", "left out"),
    (planted.running_statistics_of_one_rank, CONV, 2, "buffer", "running statistics"),
    (planted.weight_decay_forgotten, CONV, 2, "parameter", "weight decay"),
    (planted.one_rank_without_a_gradient, CONV, 2, "clipped", "rank 1"),
    (planted.not_a_number_on_one_rank, CONV, 2, "loss", "no finite loss"),
    (planted.mean_of_means, GROUPS, 3, "loss", "mean of means"),
    (planted.last_rows_dropped, GROUPS, 3, "output", "left out"),
    (planted.stale_weights_on_one_rank, CONV, 2, "parameter", "stale"),
]


@pytest.mark.parametrize(
    ("bug", "work", "ranks", "kind", "cause"),
    PLANTED,
    ids=[f"{row[0].__name__}-{row[2]}" for row in PLANTED],
)
def test_planted_bugs_are_found_and_named(pool, bug, work, ranks, kind, cause):
    findings = verify(pool, work, ranks, bug)
    assert findings["first_difference"] is not None
    assert findings["first_difference"]["kind"] == kind
    assert cause in findings["cause"], findings["cause"]


def test_pool_is_healthy_after_plants(pool):
    assert verify(pool, CONV, 2)["first_difference"] is None
