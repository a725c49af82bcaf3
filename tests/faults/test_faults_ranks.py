"""Ranks that die, fail or differ, and a supervisor that is killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from shoal_process import alive, equal, gone_within, read, weights

pytestmark = pytest.mark.timeout(120)

SLOW = ("--strategy", "dp2", "--set", "model=slow:build", "--set", "steps=1000")

# Only a rank knows which one it is: its supervisor tells it by an argument.
WHO = """
import json, sys
from torch import nn

def rank():
    try:
        return json.loads(sys.argv[1])["rank"]
    except (ValueError, IndexError):
        return None
"""


def open_files(process):
    """What a process has open, sockets and shared memory included."""
    return {str(link.readlink()) for link in Path(f"/proc/{process}/fd").iterdir()}


def left_in(folder):
    return {
        path.name for path in Path(folder).iterdir() if path.name.startswith(("shoal", "torch"))
    }


def test_a_killed_rank_ends_the_run_in_few_words_and_leaves_nothing(shoal):
    # A temporary folder of its own: tests beside this one write into the common one.
    temporary = shoal.folder / "temporary"
    temporary.mkdir()
    before = left_in("/dev/shm")
    running = shoal.start_training(*SLOW, TMPDIR=str(temporary))
    running.wait_for_step(5)
    running.wait_for_checkpoint(4)
    ranks = running.ranks()
    assert not any("socket" in name for name in open_files(running.process.pid))
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    done = running.finish()
    assert time.monotonic() - killed < 100  # the other rank's patience is 600
    assert done.status == 3
    said = [line for line in done.errors.splitlines() if "SIGKILL" in line]
    assert len(said) == 1
    assert said[0].startswith(f"error: rank 1: process {ranks[1]} was killed by SIGKILL")
    assert "Traceback" not in done.errors
    assert len(done.errors.splitlines()) <= 10
    assert not any(alive(rank) for rank in ranks)
    assert left_in("/dev/shm") <= before
    assert not list(temporary.iterdir())
    assert done.document == shoal.summary()
    assert done.document["state"] == "failed"
    assert done.document["error"]["rank"] == 1
    assert done.document["checkpoint"] == "run/checkpoints/step-000000004"
    assert shoal.lines("events.jsonl")[-1]["event"] == "fault"


def test_no_rank_outlives_its_supervisor(shoal):
    running = shoal.start_training(*SLOW)
    ranks = running.wait_for_ranks(2)
    running.wait_until(lambda: all("libtorch_cpu" in read(f"/proc/{r}/maps") for r in ranks))
    running.process.kill()
    assert gone_within(ranks, 3)


def test_a_killed_rank_is_started_again_from_the_checkpoint(shoal):
    (shoal.folder / "hold").touch()
    model = "model={name: 'slow:held', at: 7}"
    running = shoal.start_training("--strategy", "single", "--set", model, "--max-restarts", "1")
    running.wait_for_step(6)
    running.wait_for_checkpoint(4)
    os.kill(running.ranks()[0], signal.SIGKILL)
    (shoal.folder / "hold").unlink()
    done = running.finish()
    assert done.status == 0
    assert done.document["state"] == "done"
    assert done.document["steps"] == 12
    assert done.document["resumed_from_step"] == 4
    steps = [line["step"] for line in shoal.lines("metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 13))
    (recovery,) = [each for each in shoal.lines("events.jsonl") if each["event"] == "recovery"]
    assert "SIGKILL" in recovery["message"]
    assert recovery["rank"] == 0


# A model whose ranks stop in the middle of writing the checkpoint of step 8, while there is a file
# `hold`; their training goes on.
HELD_SAVE = """
import pathlib, time
from torch import nn
from shoal.checkpoint import files

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, x):
        return self.linear(x.flatten(1))

def build():
    write = files.write

    def held(path, chunks):
        def parts():
            for number, chunk in enumerate(chunks):
                while number == 1 and "000000008" in str(path) and pathlib.Path("hold").exists():
                    time.sleep(0.01)
                yield chunk
        return write(path, parts())

    files.write = held
    return Plain()
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_it_saves_leaves_the_older_checkpoint(shoal, victim):
    (shoal.folder / "mine.py").write_text(HELD_SAVE)
    (shoal.folder / "hold").touch()
    options = ("--strategy", "dp2", "--set", "model=mine:build", "--set", "steps=40")
    running = shoal.start_training(*options)
    half = shoal.folder / "run/checkpoints/.step-000000008.tmp"
    running.wait_until(lambda: len(list(half.glob("*.safetensors"))) == 2)
    running.wait_for_step(12)  # training went on to where it has to wait for the save
    os.kill(running.ranks()[victim], signal.SIGKILL)
    done = running.finish()
    assert done.status == 3
    assert done.document["error"]["kind"] == "RankLost"
    assert done.document["error"]["rank"] == victim
    assert done.document["checkpoint"] == "run/checkpoints/step-000000004"
    assert shoal.checkpoints() == ["step-000000004"]
    if victim == 1:  # the folder is as after the other's death: one of them goes on
        return
    (shoal.folder / "hold").unlink()
    done = shoal.train(*options, "--resume")
    assert done.status == 0
    assert done.document["resumed_from_step"] == 4
    undisturbed = shoal.train(*options, out="undisturbed")
    assert undisturbed.status == 0
    assert equal(weights(shoal.folder / "run", 40), weights(shoal.folder / "undisturbed", 40))
    steps = [line["step"] for line in shoal.lines("metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 41))


def test_a_ranks_own_error_is_shown_once_and_not_what_its_peers_see(shoal):
    (shoal.folder / "mine.py").write_text(
        WHO
        + """
class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(36, 3), 0

    def forward(self, x):
        print("a word from the model")
        self.calls += 1
        assert rank() != 1 or self.calls < 3, "no third call here"
        return self.linear(x.flatten(1))

def build():
    return Failing()
"""
    )
    done = shoal.train("--strategy", "dp2", "--set", "model=mine:build")
    assert done.status == 3
    assert done.document["state"] == "failed"  # and nothing but the document is there
    assert "a word from the model" in done.errors
    assert done.errors.count("no third call here") <= 2  # the message, and the line that is shown
    assert done.errors.count("error:") == 1
    assert "error: rank 1, step 2" in done.errors
    assert "mine.py" in done.errors
    assert "onnection" not in done.errors
    assert "Traceback" not in done.errors


def test_ranks_with_other_parameters_are_found_before_the_first_step(shoal):
    (shoal.folder / "mine.py").write_text(
        WHO
        + """
def build():
    layers = [nn.Flatten(), nn.Linear(36, 3)]
    if rank() == 1:
        layers[1].bias.data += 1
    return nn.Sequential(*layers)
"""
    )
    done = shoal.train("--strategy", "dp2", "--set", "model=mine:build")
    assert done.status == 3
    assert "rank 1, start-up: weights before the first step: 1.bias differs" in done.errors
    assert done.errors.count("error:") == 1
    assert shoal.lines("metrics.jsonl") == []


def test_replicas_that_drift_are_found_at_the_checkpoint(shoal):
    (shoal.folder / "mine.py").write_text(
        WHO
        + """
class Drifting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(36, 3), 0

    def forward(self, x):
        self.calls += 1
        if rank() == 1 and self.calls == 6:
            self.linear.bias.data[0] += 1e-6
        return self.linear(x.flatten(1))

def build():
    return Drifting()
"""
    )
    done = shoal.train("--strategy", "dp2", "--set", "model=mine:build")
    assert done.status == 3
    assert done.document["error"]["kind"] == "ReplicasDiffer"
    assert "linear.bias" in done.errors
    assert "1" in done.document["error"]["message"]
    assert shoal.checkpoints() == ["step-000000004"]
    assert json.loads((shoal.folder / "run/run.json").read_text())["checkpoint"].endswith("04")
