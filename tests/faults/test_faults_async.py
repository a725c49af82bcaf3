"""Asynchronous SGD: signals, a rank that dies, one that stands still; then resumed, or replayed."""

import os
import signal
import time

import pytest
from shoal_process import equal, weights

pytestmark = pytest.mark.timeout(240)

ASYNC = ("--strategy", "dp2/async:2", "--set", "model={name: 'slow:build', seconds: 0.02}")
EVERY = ("--set", "checkpoint.every=10 steps")


def complete(ledger, steps):
    """Whether each contribution of so many steps was applied once, and within the bound."""
    keys = [(line["step"], line["index"]) for line in ledger]
    assert keys == [(step, index) for step in range(steps) for index in range(2)]
    return all(0 <= line["staleness"] <= 2 for line in ledger)


def test_a_stop_ends_at_a_consistent_cut_and_the_run_goes_on_from_it(shoal):
    running = shoal.start_training(*ASYNC, "--set", "steps=400")
    running.wait_for_step(3)
    running.process.send_signal(signal.SIGTERM)
    done = running.finish()
    assert done.status == 75
    stopped_at = done.document["steps"]
    assert complete(shoal.lines("staleness.jsonl"), stopped_at)
    steps = stopped_at + 12
    shoal_recipe = shoal.folder / "run" / "recipe.yaml"
    text = shoal_recipe.read_text().replace("400", str(steps))
    shoal_recipe.write_text(text)
    done = shoal.train(*ASYNC, "--set", f"steps={steps}", "--resume")
    assert done.status == 0
    assert done.document["resumed_from_step"] == stopped_at
    assert complete(shoal.lines("staleness.jsonl"), steps)
    assert sum(done.document["staleness"]["contributions"].values()) == 2 * steps


def test_a_rank_that_dies_ends_the_run_which_resumes_from_the_newest_checkpoint(shoal):
    running = shoal.start_training(*ASYNC, *EVERY, "--set", "steps=60")
    running.wait_for_checkpoint(10)
    os.kill(running.ranks()[1], signal.SIGKILL)
    done = running.finish()
    assert done.status == 3
    assert done.document["state"] == "failed"
    assert "rank 1" in done.errors
    assert "Traceback" not in done.errors
    done = shoal.train(*ASYNC, *EVERY, "--set", "steps=60", "--resume")
    assert done.status == 0
    assert done.document["resumed_from_step"] % 10 == 0
    assert complete(shoal.lines("staleness.jsonl"), 60)


def test_a_rank_that_stands_still_for_a_while_goes_on(shoal):
    running = shoal.start_training(*ASYNC, "--set", "steps=60")
    running.wait_for_step(5)
    os.kill(running.ranks()[1], signal.SIGSTOP)
    time.sleep(3)
    os.kill(running.ranks()[1], signal.SIGCONT)
    done = running.finish()
    assert done.status == 0
    assert complete(shoal.lines("staleness.jsonl"), 60)


def test_a_replay_gives_the_same_bits(shoal):
    assert shoal.train(*ASYNC, "--set", "steps=30").status == 0
    ledger = shoal.folder / "run" / "staleness.jsonl"
    again = ("--set", "steps=30", "--replay", str(ledger))
    assert shoal.train(*ASYNC, *again, out="again").status == 0
    folders = shoal.folder / "run", shoal.folder / "again"
    assert equal(*(weights(folder, 30) for folder in folders))


@pytest.mark.parametrize(
    ("strategy", "line", "said"),
    [
        ("dp2/async:1", '{"step": 2, "index": 0, "computed_on": 0}', "staleness 1"),
        ("dp2/async:1", '{"step": 2}', "no line of a ledger"),
        ("dp2", '{"step": 2, "index": 0, "computed_on": 2}', "async"),
    ],
)
def test_a_ledger_of_another_run_is_refused(shoal, strategy, line, said):
    (shoal.folder / "ledger.jsonl").write_text(line + "\n")
    done = shoal.train("--strategy", strategy, "--replay", "ledger.jsonl")
    assert done.status in (2, 3)
    assert said in done.errors
