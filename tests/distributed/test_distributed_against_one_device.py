"""Training split over 2, 3 and 4 ranks beside a plain loop on one device, in float64.

50 examples on 3 ranks are 17 + 17 + 16; the last batch of an epoch has fewer examples than ranks.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onedevice import (
    Case,
    adamw,
    batches_of,
    compare,
    images,
    summed_cross_entropy,
    train_plainly,
    train_split,
)
from shoal.models import ResNet, ResNetOptions, Transformer, TransformerOptions, mlp

TOLERANCE = 1e-10


def resnet(**options: Any) -> nn.Module:
    shape = {"width": 4, "classes": 5, "in_channels": 1, "image_size": 16}
    return ResNet(ResNetOptions(**{**shape, **options}))


def small(**options: Any) -> Case:
    """A perceptron on images; 50, 50 and 3 examples a step, then the next epoch."""
    return Case(
        **{
            "build": lambda: mlp(256, 5, [16, 16]),
            "batches": batches_of(*images(103), 50, 4),
            **options,
        }
    )


MODELS = {
    "mlp": small,
    "mlp, adamw": lambda: small(optimizer=adamw),
    "mlp, clipped": lambda: small(clip_norm=0.1),
    "resnet": lambda: small(build=resnet),
    "resnet, depthwise": lambda: small(build=lambda: resnet(conv="depthwise_separable")),
    "resnet, group norm": lambda: small(build=lambda: resnet(norm="group"), optimizer=adamw),
    "resnet, bottleneck": lambda: small(build=lambda: resnet(depth=50, width=2)),
    "transformer": lambda: small(
        build=lambda: Transformer(
            TransformerOptions(classes=5, length=16, features=16, width=16, heads=2, layers=2)
        )
    ),
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_as_on_one_device(
    pool: Any, name: str, ranks: int, tmp_path: Path
) -> None:
    case = MODELS[name]()
    errors = compare(train_plainly(case), train_split(pool, ranks, case, tmp_path))
    assert max(errors.values()) <= TOLERANCE, errors
