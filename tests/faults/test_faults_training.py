"""Data, losses and disks that spoil a run after its start: named, and what was saved is kept."""

import os
import resource
import subprocess

import numpy as np
import pytest
from PIL import Image
from shoal_process import weights

pytestmark = pytest.mark.timeout(120)

PICTURES = ("--set", "data.train=photos", "--set", "data.evaluate=null", "--set", "steps=4")


@pytest.fixture
def photos(shoal):
    """A folder of 24 pictures in two classes; one of them is cut short."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (shoal.folder / "photos" / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 255, (6, 6, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(shoal.folder / f"photos/{name}/{number:02d}.jpg")
    bad = shoal.folder / "photos/dog/05.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    return shoal


def test_a_corrupt_picture_is_named(photos):
    done = photos.train("--strategy", "single", *PICTURES)
    assert done.status == 3
    assert done.document["error"]["kind"] == "BadExample"
    assert "photos/dog/05.jpg cannot be read" in done.errors
    assert "data.on_bad_example=skip" in done.errors
    assert done.errors.count("05.jpg") == 1


def test_a_corrupt_picture_is_skipped_counted_and_named_once(photos):
    done = photos.train("--strategy", "single", *PICTURES, "--set", "data.on_bad_example=skip")
    assert done.status == 0
    assert done.document["bad_examples"] == 2  # once in each of the two epochs
    events = [each for each in photos.lines("events.jsonl") if each["event"] == "bad example"]
    assert len(events) == 1
    assert "photos/dog/05.jpg" in events[0]["message"]
    assert events[0]["rank"] == 0
    assert done.errors.count("05.jpg") == 1


def test_a_loss_that_is_nan_on_one_rank_names_it_and_keeps_the_last_checkpoint(shoal):
    (shoal.folder / "mine.py").write_text(
        """
import json, sys
from torch import nn

class Spoiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(36, 3), 0

    def forward(self, x):
        self.calls += 1
        wrong = self.calls == 7 and json.loads(sys.argv[1])["rank"] == 1
        return self.linear(x.flatten(1)) * (float("nan") if wrong else 1.0)

def build():
    return Spoiled()
"""
    )
    done = shoal.train("--strategy", "dp2", "--set", "model=mine:build")
    assert done.status == 3
    assert "error: rank 1, step 6, loss: the loss is nan" in done.errors
    assert done.errors.count("error:") == 1
    assert shoal.summary()["state"] == "failed"
    assert shoal.summary()["steps"] == 6
    assert shoal.summary()["checkpoint"] == "run/checkpoints/step-000000004"
    assert set(weights(shoal.folder / "run", 4)) >= {"linear.weight", "linear.bias"}


def test_a_loss_without_a_gradient_is_refused_at_step_0(shoal):
    (shoal.folder / "mine.py").write_text(
        "def loss(outputs, targets):\n    return (outputs.argmax(1) != targets).float().sum()\n"
    )
    done = shoal.train("--strategy", "dp2", "--set", "objective=mine:loss")
    assert done.status == 3
    assert done.document["error"]["kind"] == "NoGradient"
    assert done.document["error"]["step"] == 0
    assert "argmax" in done.errors
    assert done.errors.count("error:") == 1
    assert "Traceback" not in done.errors


def test_a_disk_that_is_full_at_a_save_costs_no_older_checkpoint(shoal):
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = shoal.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this root may not mount")
    try:
        # Weights and momentum of one checkpoint take about 130 KB.
        wide = ("--set", "model.widths=[384]", "--set", "evaluate.every=100 steps")
        done = shoal.train(
            "--strategy", "single", *wide, "--set", "checkpoint.keep=9", out="disk/run"
        )
        assert done.status == 3
        assert done.document["state"] == "failed"
        assert done.document["error"]["kind"] == "DiskFull"
        assert done.document["error"]["step"] == 12
        assert "No space left" in done.errors
        assert "free some space" in done.errors
        assert shoal.checkpoints("disk/run") == ["step-000000004", "step-000000008"]
        assert set(weights(disk / "run", 8)) >= {"1.weight", "1.weight/momentum_buffer"}
        assert shoal.summary("disk/run")["state"] == "failed"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def test_a_disk_that_is_full_for_the_log_is_said_too(shoal):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
        options = ("--set", "steps=200", "--set", "checkpoint.every=1000 steps")
        running = shoal.start_training("--strategy", "single", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    done = running.finish()
    assert done.status == 3
    assert done.document["error"]["kind"] == "DiskFull"
    assert "metrics.jsonl cannot be written to" in done.errors
    assert "Traceback" not in done.errors
