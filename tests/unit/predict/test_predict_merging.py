"""Averages and statistics; scores by hand."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from shoal.data import Batch
from shoal.errors import Refused
from shoal.predict.merging import average, check_alike, estimate_statistics
from shoal.predict.scores import Scores, interval, resampled


@dataclass
class Rows:
    """A feed of some inputs, in order."""

    inputs: torch.Tensor
    batch_size: int = 8

    @property
    def steps_per_epoch(self):
        return -(-len(self.inputs) // self.batch_size)

    def batch_examples(self, step):
        return min(self.batch_size, len(self.inputs) - step * self.batch_size)

    def read(self, step, start, stop):
        ids = torch.arange(step * self.batch_size + start, step * self.batch_size + stop)
        return Batch(self.inputs[ids], torch.zeros(len(ids)).long(), ids, ids)


def test_the_mean_is_taken_in_float64_and_counters_are_the_firsts():
    one = {"w": torch.tensor([1e8, 1.0]), "n": torch.tensor(3)}
    two = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(9)}
    mean = average([one, two, one], (0.25, 0.5, 0.25))
    assert torch.equal(mean["w"], torch.tensor([50000000.5, 1.5]))
    assert int(mean["n"]) == 3


def test_unlike_states_are_named():
    with pytest.raises(Refused, match=r"a and c .* w has shape \[2\] in the first"):
        check_alike(["a", "b", "c"], [{"w": torch.ones(2)}] * 2 + [{"w": torch.ones(3)}])


def test_statistics_are_of_whole_batches_and_modes_stay():
    inputs = torch.randn(20, 3) * torch.tensor([1.0, 5.0, 0.1]) + 2
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()
    model[0].running_mean.fill_(7.0)
    assert estimate_statistics(model, Rows(inputs), torch.device("cpu")) == 16
    batches = inputs[:8], inputs[8:16]
    means = torch.stack([batch.mean(0) for batch in batches]).mean(0)
    variances = torch.stack([batch.var(0) for batch in batches]).mean(0)
    assert torch.allclose(model[0].running_mean, means, atol=1e-6)
    assert torch.allclose(model[0].running_var, variances, rtol=1e-5)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert model[0].momentum == 0.1


def test_scores_by_hand():
    given = np.array([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.05, 0.95]])
    scores = Scores.of(given, np.array([0, 1, 1, 1]))
    assert scores.accuracy == 0.75
    assert scores.loss == pytest.approx(-np.log([0.9, 0.4, 0.7, 0.95]).mean())
    # Each in a bin of its own: |1 − 0.9|, |0 − 0.6|, |1 − 0.7|, |1 − 0.95|.
    assert scores.calibration_error == pytest.approx((0.1 + 0.6 + 0.3 + 0.05) / 4)
    both = Scores.of(np.array([[0.62, 0.38], [0.64, 0.36]]), np.array([0, 1]))  # one bin
    assert both.calibration_error == pytest.approx(abs(1 - 1.26) / 2)


def test_intervals_are_paired_and_seeded():
    random = np.random.default_rng(0)
    right = (random.random(200) < 0.8).astype(float)
    better = np.maximum(right, (random.random(200) < 0.1).astype(float))
    scores = {
        name: Scores(each, np.ones(200), np.full(200, 0.8))
        for name, each in (("one", right), ("two", better))
    }
    drawn = resampled(scores)
    again = resampled(scores)
    low, high = interval(drawn["one"]["accuracy"])
    assert low < right.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.8 * 0.2 / 200), rel=0.2)
    assert np.all(drawn["two"]["accuracy"] >= drawn["one"]["accuracy"])  # on every draw
    assert np.array_equal(again["one"]["accuracy"], drawn["one"]["accuracy"])
