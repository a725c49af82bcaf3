"""SIGINT and SIGTERM: save and leave with 75; again: leave at once; then go on to equal weights."""

import os
import signal
import time

import pytest
from shoal_process import equal, gone_within, weights

pytestmark = pytest.mark.timeout(180)

SLOW = ("--strategy", "dp2", "--set", "model=slow:build")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The weights after 12 steps of a run that nobody disturbs."""
    from shoal_process import Shoal

    shoal = Shoal(tmp_path_factory.mktemp("undisturbed"))
    assert shoal.train(*SLOW).status == 0
    return weights(shoal.folder / "run", 12)


def test_stopped_by_sigterm_and_resumed_ends_in_the_same_weights(shoal, undisturbed):
    running = shoal.start_training(*SLOW)
    running.wait_for_step(6)
    running.process.send_signal(signal.SIGTERM)
    done = running.finish()
    assert done.status == 75
    assert done.document["state"] == "stopped"
    stopped_at = done.document["steps"]
    assert 6 <= stopped_at < 12
    assert done.document["checkpoint"] == f"run/checkpoints/step-{stopped_at:09d}"
    assert "resume  shoal train run/recipe.yaml" in done.errors

    done = shoal.train(*SLOW, "--resume")
    assert done.status == 0
    assert done.document["resumed_from_step"] == stopped_at
    assert done.document["samples"] == 144
    assert equal(weights(shoal.folder / "run", 12), undisturbed)
    steps = [line["step"] for line in shoal.lines("metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 13))


def test_ctrl_c_reaches_the_supervisor_and_its_process_group_and_stops_once(shoal):
    running = shoal.start_training(*SLOW, "--set", "steps=1000")
    running.wait_for_step(3)
    ranks = running.ranks()
    # What a terminal does: every process of the foreground group gets the signal.
    os.killpg(running.process.pid, signal.SIGINT)
    done = running.finish()
    assert done.status == 75
    assert "Traceback" not in done.errors
    assert gone_within(ranks, 1)


def test_a_second_signal_ends_at_once(shoal):
    options = ("--strategy", "dp2", "--set", "model={name: 'slow:build', seconds: 20}")
    running = shoal.start_training(*options)
    ranks = running.wait_for_ranks(2)
    time.sleep(4)  # the ranks are, most likely, in a step of 20 seconds
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    done = running.finish()
    assert time.monotonic() - sent < 3
    assert done.status == 128 + signal.SIGINT
    assert gone_within(ranks, 2)
    assert done.document["state"] == "stopped"
    assert "Traceback" not in done.errors


def test_a_signal_while_ranks_start_is_not_lost(shoal):
    running = shoal.start_training(*SLOW, "--set", "steps=1000")
    ranks = running.wait_for_ranks(2)  # Python itself is starting there
    running.process.send_signal(signal.SIGTERM)
    done = running.finish()
    assert done.status == 75
    assert done.document["state"] == "stopped"
    assert done.document["steps"] == 1
    assert gone_within(ranks, 1)


def test_a_signal_in_an_evaluation_stops_after_it(shoal):
    # Two batches of the evaluation set take two seconds on each rank.
    options = ("--set", "model={name: 'slow:build', seconds: 1}", "--set", "evaluate.every=1 step")
    running = shoal.start_training("--strategy", "single", *options)
    running.wait_for_step(1)
    running.process.send_signal(signal.SIGINT)  # the step is logged before it is evaluated
    done = running.finish()
    assert done.status == 75
    assert done.document["steps"] == 2
    assert done.document["metrics"]["accuracy"] >= 0
    assert len(shoal.lines("metrics.jsonl")) == 4
