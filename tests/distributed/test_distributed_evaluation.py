"""Evaluation counts each example once, for any size of the set and any number of ranks."""

from typing import Any

import pytest
import torch
from onedevice import Batches, Case, assembled, batches_of, images
from torch import Tensor, nn

from shoal.learn import build_metrics
from shoal.predict import evaluate


class Flat(nn.Module):
    """Normalises, drops, and cannot be called with no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(images.view(len(images), -1))))


def case(examples: int) -> Case:
    return Case(build=Flat, batches=batches_of(*images(examples, side=4), 20, -(-examples // 20)))


def _evaluate(groups: Any, case: Case) -> dict[str, float]:
    from dataclasses import replace

    job = assembled(groups, case)
    held_out, metrics = Batches(case.batches), build_metrics(["accuracy"])
    job.workload = replace(job.workload, evaluation=held_out, metrics=metrics)
    found = evaluate(job).metrics
    assert job.replica.model.training
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("examples", [61, 40, 3, 1])
def test_each_example_once(pool: Any, examples: int, ranks: int) -> None:
    inputs, targets = images(examples, side=4)
    torch.manual_seed(case(examples).seed)
    outputs = Flat().double().eval()(inputs.double()).detach()
    expected = {
        "loss": float(nn.functional.cross_entropy(outputs, targets)),
        "accuracy": float((outputs.argmax(1) == targets).double().mean()),
    }
    for found in pool.run(_evaluate, case(examples), ranks=ranks):
        assert found == pytest.approx(expected, rel=1e-12)
