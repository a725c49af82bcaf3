"""Checkpoints of replicas that differ: read one by one, or as their mean."""

from pathlib import Path

import pytest
import torch

from shoal.checkpoint import Alone, Checkpoint, Piece, Snapshot, checkpoint_path, replicas, save
from shoal.errors import RunError
from shoal.layout import Slice


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoint:
    tensors = {}
    for number in range(3):
        start = replicas.prefix(number)
        weight = torch.arange(6.0).reshape(2, 3) * (number + 1)
        tensors[start + "fc.weight"] = Piece.whole(weight)
        tensors[start + "fc.weight/exp_avg"] = Piece.whole(-weight)
        tensors[start + "seen"] = Piece.whole(torch.tensor(number + 5))
    snapshot = Snapshot(
        step=4,
        tensors=tensors,
        fingerprint="f",
        strategy="dp3/solo",
        position={},
        sync={"replicas": 3, "agreement": "solo"},
        optimizer={f"replica-{number}": {"groups": [number]} for number in range(3)},
        aliases={"replica-1/head.weight": "replica-1/fc.weight"},
    )
    save(tmp_path, snapshot, Alone())
    return Checkpoint.open(checkpoint_path(tmp_path, 4))


def test_one_of_them_is_a_checkpoint_of_its_own(saved: Checkpoint) -> None:
    assert replicas.count(saved) == 3
    second = replicas.one_of(saved, 1)
    assert second.names == ("fc.weight", "fc.weight/exp_avg", "seen")
    assert second.weights == ("fc.weight", "seen")
    assert torch.equal(second.read("fc.weight"), torch.arange(6.0).reshape(2, 3) * 2)
    assert torch.equal(second.read("head.weight"), second.read("fc.weight"))
    assert second.manifest.optimizer == {"groups": [1]}
    assert replicas.count(second) == 0
    assert second.step == 4
    second.verify()
    with pytest.raises(RunError, match="has no replica 3: there are 3 of them"):
        replicas.one_of(saved, 3)


def test_their_mean(saved: Checkpoint) -> None:
    mean = replicas.Mean.of(saved)
    assert torch.equal(mean.read("fc.weight"), torch.arange(6.0).reshape(2, 3) * 2)
    box = Slice((2, 3), (1, 0), (1, 3))
    assert torch.equal(mean.read("fc.weight/exp_avg", box), -torch.arange(3.0, 6.0)[None] * 2)
    assert int(mean.read("seen")) == 5  # the first one's
    assert mean.weights == ("fc.weight", "seen")


def test_one_set_of_weights_has_no_replicas(tmp_path: Path) -> None:
    snapshot = Snapshot(1, {"w": Piece.whole(torch.ones(2))}, "f", "dp2", {})
    save(tmp_path, snapshot, Alone())
    assert replicas.count(Checkpoint.open(checkpoint_path(tmp_path, 1))) == 0
