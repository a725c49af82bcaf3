"""Ranks that torchrun, Slurm or a person has started: one document, one error, no orphans."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from shoal_process import read

pytestmark = pytest.mark.timeout(180)

TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2")


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def by_torchrun(port):
    return (*TORCHRUN, "--master-port", str(port), "-m", "shoal")


def by_hand(rank, port, size=2):
    """The environment that torchrun gives to a rank, without its agent."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def by_slurm(rank, port):
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "MASTER_PORT": str(port),
    }


def all_ranks(shoal, environment, *options):
    port = free_port()
    started = [shoal.start_training(*options, **environment(rank, port)) for rank in range(2)]
    return [running.finish() for running in started]


@pytest.mark.long
def test_torchrun_gives_one_document(shoal):
    done = shoal.train("--strategy", "dp2", command=by_torchrun(free_port()))
    assert done.status == 0, done
    assert done.document["state"] == "done"
    assert done.document["world_size"] == 2
    assert done.document == shoal.summary()
    assert done.document["run"] == "run"
    assert done.document["checkpoint"] == "run/checkpoints/step-000000012"
    assert done.errors.count("tiny · dp2") == 1


def test_a_stopped_torchrun_saves(shoal):
    options = ("--strategy", "dp2", "--set", "model=slow:build", "--set", "steps=2000")
    running = shoal.start_training(*options, command=by_torchrun(free_port()))
    running.wait_for_step(5)
    running.process.send_signal(signal.SIGTERM)
    done = running.finish()
    summary = shoal.summary()
    assert summary["state"] == "stopped"
    assert summary["checkpoint"] == f"run/checkpoints/step-{summary['steps']:09d}"
    assert done.document == summary  # one document, of rank 0 alone
    assert done.errors.count("tiny · dp2") == 1


def test_a_failing_rank_is_told_once_and_rank_0_has_the_document(shoal):
    (shoal.folder / "mine.py").write_text(
        """
import os
from torch import nn

class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(36, 3), 0

    def forward(self, x):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 4:
            raise ValueError("enough of this")
        return self.linear(x.flatten(1))

def build():
    print("built")
    return Failing()
"""
    )
    options = ("--strategy", "dp2", "--set", "model=mine:build")
    first, second = all_ranks(shoal, by_hand, *options)
    assert (first.status, second.status) == (3, 3)
    assert "enough of this" not in first.errors
    assert second.errors.count("error: rank 1, step 3") == 1
    assert "enough of this" in second.errors
    assert second.output == ""
    assert first.document["state"] == "failed"
    assert "enough of this" in first.document["reason"]
    assert first.document["error"]["rank"] == 1
    assert first.document == shoal.summary()
    faults = [each for each in shoal.lines("events.jsonl") if each["event"] == "fault"]
    assert len(faults) == 1


def test_slurm_ranks_meet_and_one_that_is_killed_is_told_of(shoal):
    port = free_port()
    options = ("--strategy", "dp2", "--set", "model=slow:build", "--set", "steps=2000")
    ranks = [shoal.start_training(*options, **by_slurm(rank, port)) for rank in range(2)]
    ranks[0].wait_for_step(3)
    os.kill(ranks[1].process.pid, signal.SIGKILL)
    done = ranks[0].finish()
    assert done.status == 3
    assert done.document["state"] == "failed"
    assert "another rank has left without a word" in done.errors
    assert done.errors.count("error:") == 1


def test_the_wrong_number_of_ranks_is_said_once(shoal):
    first, second = all_ranks(shoal, by_hand, "--strategy", "dp3")
    assert (first.status, second.status) == (2, 2)
    assert "strategy dp3 needs 3 ranks, and WORLD_SIZE says that 2 were started" in first.errors
    assert first.document["error"]["kind"] == "WorldError"
    assert (second.output, second.errors) == ("", "")


def test_a_taken_port_is_said_with_what_to_change(shoal):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = shoal.train("--strategy", "dp2", **by_hand(0, port))
    assert done.status == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.errors
    assert "MASTER_PORT" in done.errors
    assert len(done.errors.splitlines()) <= 4
    assert done.document["error"]["kind"] == "WorldError"
    assert not (shoal.folder / "run").exists()


def test_a_second_signal_ends_a_rank_that_waits_for_the_others(shoal):
    running = shoal.start_training("--strategy", "dp2", **by_hand(1, free_port()))
    running.wait_until(lambda: "libgloo" in maps(running) or "libtorch_cpu" in maps(running))
    time.sleep(4)  # most likely it is waiting for rank 0 by now, inside torch
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGTERM)
    assert running.finish(5).status == 128 + signal.SIGTERM


def maps(running):
    return read(Path(f"/proc/{running.process.pid}/maps"))


def test_a_folder_that_only_rank_0_opens_fails_on_all(shoal):
    (shoal.folder / "run").mkdir()
    (shoal.folder / "run/notes.txt").write_text("mine")
    first, second = all_ranks(shoal, by_hand, "--strategy", "dp2")
    assert (first.status, second.status) == (2, 2)
    assert "run is not empty: it holds notes.txt" in first.errors
    assert first.document["error"]["kind"] == "RunFolderError"
    assert (second.output, second.errors) == ("", "")
