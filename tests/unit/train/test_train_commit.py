"""Checkpoints that are saved beside training: what is in them, what fails, who waits for whom."""

import errno
import os
import threading
import time

import pytest
from torch import nn

from shoal.checkpoint import Checkpoint, checkpoint_path, files
from shoal.errors import DiskFull, NotFinite
from shoal.train import commit

SAVE = commit.save


@pytest.fixture
def saving(monkeypatch):
    """Puts a function in the way of each save: ``saving(lambda step: …)``."""

    def put(before):
        def save(folder, snapshot, *rest):
            before(snapshot.step)
            return SAVE(folder, snapshot, *rest)

        monkeypatch.setattr(commit, "save", save)

    return put


class Counting(nn.Module):
    """Tells the test of each forward pass in training."""

    begun = 0
    reached = threading.Event()
    wanted = 0
    spoiled_at = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        if self.training:
            Counting.begun += 1
            if Counting.begun == Counting.wanted:
                Counting.reached.set()
        wrong = self.training and Counting.begun == Counting.spoiled_at
        return self.linear(x.flatten(1)) * (float("nan") if wrong else 1.0)


def build():
    return Counting()


@pytest.fixture
def counting(monkeypatch):
    """``counting(7)``: `Counting.reached` is set when the seventh step has begun."""

    def want(step, spoiled_at=0):
        monkeypatch.setattr(Counting, "begun", 0)
        monkeypatch.setattr(Counting, "reached", threading.Event())
        monkeypatch.setattr(Counting, "wanted", step)
        monkeypatch.setattr(Counting, "spoiled_at", spoiled_at)

    want(0)
    return want


MODEL = f"model={__name__}:build"


def test_the_weights_are_those_of_the_step_though_training_goes_on(
    small, tmp_path, saving, counting
):
    met = []
    counting(7)
    # Step 4's save does not begin before step 7 has: the optimizer has changed all there is.
    saving(lambda step: met.append(Counting.reached.wait(20)) if step == 4 else None)
    small.train(MODEL, "checkpoint.keep=9")
    assert met == [True]
    late = small.weights(4)
    saving(lambda step: None)
    alone = type(small)(tmp_path / "alone")
    alone.train(MODEL, stop_after=4)
    assert any(name.endswith("/momentum_buffer") for name in late)
    assert late.keys() == alone.weights(4).keys()
    assert all(late[name].equal(tensor) for name, tensor in alone.weights(4).items())
    assert not late["linear.weight"].equal(small.weights(8)["linear.weight"])
    manifests = [
        Checkpoint.open(checkpoint_path(each.run.checkpoints_path, 4)).manifest
        for each in (small, alone)
    ]
    assert manifests[0].position == manifests[1].position
    assert manifests[0].optimizer == manifests[1].optimizer


def test_a_checkpoint_is_told_of_once_it_is_there(small, saving, counting):
    told = []

    def look(step):
        if step == 4:
            Counting.reached.wait(20)
            told.extend(small.messages)

    counting(7)
    saving(look)
    small.train(MODEL)
    assert [each["step"] for each in told if each["kind"] == "checkpoint"] == []
    told = [each["step"] for each in small.messages if each["kind"] == "checkpoint"]
    assert told == [4, 8, 12]


def test_a_second_save_waits_for_the_first(small, saving):
    inside, most = [], []

    def once(step):
        inside.append(step)
        time.sleep(0.02)  # steps take less than that
        most.append(len(inside))
        inside.remove(step)

    saving(once)
    done = small.train("checkpoint.every=1 step", "checkpoint.keep=99")
    assert most == [1] * 12
    assert small.checkpoints == list(range(1, 13))
    assert done["timings"].keys() >= {"checkpoint", "checkpoint_hidden"}


def test_the_best_stays_though_a_better_one_comes_before_it_is_saved(small, saving, counting):
    # The save of step 2 prunes with what was the best then.
    counting(3)
    saving(lambda step: Counting.reached.wait(20) if step == 2 else None)
    done = small.train(
        MODEL, "evaluate.every=1 step", "checkpoint.every=100 steps", "checkpoint.keep=1",
        "optimizer.lr=0.01", steps=6,
    )  # fmt: skip
    assert small.checkpoints == sorted({done["best"]["best_step"], 6})


def test_asked_to_stop_it_waits_for_the_last_save(small, saving):
    saving(lambda step: time.sleep(0.1))
    done = small.train(stop_after=6)
    assert done["state"] == "stopped"
    assert done["checkpoint"].endswith("step-000000006")
    assert small.checkpoints == [4, 6]
    assert small.train(resume=True)["resumed_from_step"] == 6


def test_another_error_lets_the_save_in_flight_end(small, saving, counting):
    counting(6, spoiled_at=6)

    def late(step):
        assert Counting.reached.wait(20)
        time.sleep(0.1)

    saving(late)
    with pytest.raises(NotFinite) as caught:
        small.train(MODEL)
    assert caught.value.step == 5
    assert small.checkpoints == [4]


def full_disk(monkeypatch, at):
    """No space for the checkpoint of step `at`."""
    write = files.os.write

    def refuse(descriptor, data):
        if f".step-{at:09d}.tmp" in os.readlink(f"/proc/self/fd/{descriptor}"):  # noqa: PTH115
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(files.os, "write", refuse)


@pytest.mark.parametrize("at", [8, 12])
def test_a_save_that_fails_ends_the_run_and_the_older_one_stays(small, monkeypatch, at):
    full_disk(monkeypatch, at)
    with pytest.raises(DiskFull) as caught:
        small.train("checkpoint.keep=9")
    assert (caught.value.step, caught.value.phase, caught.value.rank) == (at, "checkpoint", 0)
    assert small.checkpoints == list(range(4, at, 4))
    told = [each["step"] for each in small.messages if each["kind"] == "checkpoint"]
    assert told == small.checkpoints
    monkeypatch.undo()
    assert small.train("checkpoint.keep=9", resume=True)["resumed_from_step"] == at - 4


def test_a_failed_save_ends_the_run_before_the_next_one_is_due(small, saving, counting):
    def fail(step):
        raise DiskFull("no space for it", step=step)

    saving(fail)
    with pytest.raises(DiskFull, match="no space for it") as caught:
        small.train(MODEL, "checkpoint.every=300 steps", "evaluate.every=1000 steps", steps=599)
    assert caught.value.step == 300
    assert 300 < Counting.begun < 599
