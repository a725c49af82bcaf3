"""Models that are cut into stages or within layers: killed ranks, signals, and what cannot be."""

import os
import signal
import time

import pytest
from shoal_process import alive

pytestmark = pytest.mark.timeout(180)

# Nothing of a model's own code runs in the steps of a traced one; its objective's does.
HELD = """
import time
import torch
from torch import nn
from torch.nn import functional as F

def slow(outputs, targets):
    time.sleep(0.01)
    return F.cross_entropy(outputs, targets, reduction="sum"), torch.tensor(float(len(targets)))

class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(36, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.first(x.flatten(1)).relu())

class Looking(Held):
    def forward(self, x):
        h = self.first(x.flatten(1))
        if h.sum() > 0:
            h = -h
        return self.last(h)

class Alone(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.flatten(1)[:, :3] * self.scale
"""
SLOW = ("--set", "model=mine:Held", "--set", "objective=mine:slow", "--set", "steps=400")


@pytest.fixture
def staged(shoal):
    (shoal.folder / "mine.py").write_text(HELD)
    return shoal


@pytest.mark.parametrize("strategy", ["pp2", "tp2"])
def test_a_rank_killed_in_a_step_is_named_and_started_again(staged, strategy):
    options = (*SLOW, "--set", "steps=60", "--max-restarts", "1")
    running = staged.start_training("--strategy", strategy, *options)
    running.wait_for_checkpoint(4)
    ranks = running.ranks()
    os.kill(ranks[1], signal.SIGKILL)
    done = running.finish(120)
    assert done.status == 0, done
    assert not any(alive(rank) for rank in ranks)
    assert done.document["resumed_from_step"] >= 4
    steps = [line["step"] for line in staged.lines("metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 61))
    (recovery,) = [each for each in staged.lines("events.jsonl") if each["event"] == "recovery"]
    assert recovery["rank"] == 1
    assert "SIGKILL" in recovery["message"]


def test_a_pipeline_that_is_stopped_goes_on_in_one_rank(staged):
    running = staged.start_training("--strategy", "pp2", *SLOW)
    running.wait_for_step(3)
    ranks = running.ranks()
    os.kill(ranks[1], signal.SIGSTOP)  # the others wait, and nothing is lost
    time.sleep(0.3)
    os.kill(ranks[1], signal.SIGCONT)
    os.killpg(running.process.pid, signal.SIGINT)
    stopped = running.finish(120)
    assert stopped.status == 75, stopped
    step = stopped.document["steps"]
    assert stopped.document["split"][0].startswith("pipeline: 2 stages")
    assert staged.lines("events.jsonl")[1]["event"] == "choice"
    running = staged.start_training("--strategy", "single", *SLOW, "--resume")
    running.wait_for_step(step + 1)
    running.process.send_signal(signal.SIGTERM)
    done = running.finish(120)
    assert done.status == 75
    assert done.document["resumed_from_step"] == step


@pytest.mark.parametrize(
    ("strategy", "model", "words"),
    [
        ("pp2", "Looking", "mine.py:22: if h.sum() > 0:"),
        ("pp2", "Alone", "2 stages needs 1 cut, and the model has no places where it can be cut"),
    ],
)
def test_what_cannot_be_staged_is_said_once(staged, strategy, model, words):
    done = staged.train("--strategy", strategy, "--set", f"model=mine:{model}")
    assert done.status == 3
    assert done.document["error"]["kind"] == "Refused"
    assert done.errors.count(words) == 1
    assert done.errors.count("error:") == 1
    assert "Traceback" not in done.errors


def test_tensor_parallelism_with_nothing_to_cut_works_and_warns(staged):
    done = staged.train("--strategy", "tp2", "--set", "model=mine:Alone", "--set", "steps=2")
    assert done.status == 0, done
    assert "warning: nothing to cut: all parameters are whole on each rank" in done.errors
    assert done.document["split"][0].startswith("tensor: 0 of 1 tensors")
