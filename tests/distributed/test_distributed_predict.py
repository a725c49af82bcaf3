"""Ranks predict what one device does: inputs in order, each once; ensembles to the bit."""

import numpy as np
import pytest

import shoal
from predicting import trained
from shoal.predict.inputs import Spec
from shoal.predict.members import members_of
from shoal.predict.on_rank import PredictTask, predict_on_rank
from shoal.predict.parts import PartsFolder, Rows

MODEL = {"name": "resnet", "depth": 18, "width": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solo") / "run"
    return trained(folder, "single/solo:members=3", model=MODEL, steps=2)


def _predicted(pool, members, strategy, folder, ranks, *, ensemble):
    folder.mkdir()
    task = PredictTask(
        members=tuple(member.to_json() for member in members),
        ensemble=ensemble,
        strategy=strategy,
        device="cpu",
        spec=Spec("digits", "test"),
        folder=str(folder),
    )
    pool.call(predict_on_rank, task, ranks=ranks)
    parts = [PartsFolder(folder).read(step) for step in range(4)]
    return Rows(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def test_an_ensemble_over_ranks_has_the_bits_of_its_members_one_after_another(pool, run, tmp_path):
    members = members_of([run], skip_damaged=False).members
    alone = _predicted(pool, members, "single", tmp_path / "one", 1, ensemble=True)
    for strategy, ranks in (("dp2", 2), ("dp4", 4)):
        found = _predicted(pool, members, strategy, tmp_path / strategy, ranks, ensemble=True)
        assert np.array_equal(found.ids, np.arange(360))
        assert np.array_equal(found.labels, alone.labels)
        assert np.array_equal(found.probabilities, alone.probabilities)


@pytest.mark.parametrize("strategy", ["dp2", "pp2", "tp2"])
def test_one_model_over_ranks_is_the_model_on_one_device(pool, run, tmp_path, strategy):
    member = members_of([run], skip_damaged=False).members[:1]
    expected = shoal.predict(run, "digits:test", how="best").rows.labels
    alone = _predicted(pool, member, "single", tmp_path / "one", 1, ensemble=False)
    found = _predicted(pool, member, strategy, tmp_path / "two", 2, ensemble=False)
    assert np.array_equal(found.ids, np.arange(360))
    assert np.array_equal(found.labels, expected)
    assert np.allclose(found.probabilities, alone.probabilities, atol=1e-5)
    assert alone.probabilities.std() > 1e-3
