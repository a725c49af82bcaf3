"""SIGINT and SIGTERM: save and leave with 75; again: leave at once."""

import os
import signal
import time

import pytest
from shoal_process import gone_within

pytestmark = pytest.mark.timeout(120)

SLOW = ("--strategy", "single", "--set", "model=slow:build", "--set", "steps=1000")


def test_ctrl_c_reaches_the_supervisor_and_its_process_group_and_stops_once(shoal):
    running = shoal.start_training(*SLOW)
    running.wait_for_step(3)
    ranks = running.ranks()
    # What a terminal does: every process of the foreground group gets the signal.
    os.killpg(running.process.pid, signal.SIGINT)
    done = running.finish()
    assert done.status == 75
    assert "Traceback" not in done.errors
    assert gone_within(ranks, 20)


def test_a_second_signal_ends_at_once(shoal):
    (shoal.folder / "hold").touch()
    model = "model={name: 'slow:held', at: 3}"
    running = shoal.start_training("--strategy", "single", "--set", model)
    running.wait_for_step(2)
    ranks = running.ranks()
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    done = running.finish()
    assert time.monotonic() - sent < 60  # the step would be held for ever
    assert done.status == 128 + signal.SIGINT
    assert gone_within(ranks, 20)
    assert done.document["state"] == "stopped"
    assert done.document["steps"] == 2
    assert "Traceback" not in done.errors


def test_a_signal_while_ranks_start_is_not_lost(shoal):
    running = shoal.start_training(*SLOW)
    ranks = running.wait_for_ranks(1)  # Python itself is starting there
    running.process.send_signal(signal.SIGTERM)
    done = running.finish()
    assert done.status == 75
    assert done.document["state"] == "stopped"
    assert done.document["steps"] == 1
    assert gone_within(ranks, 20)


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
