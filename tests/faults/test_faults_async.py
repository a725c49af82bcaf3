"""Asynchronous SGD: signals, ranks that die, stand still, rejoin; then resumed, or replayed."""

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


@pytest.mark.parametrize("seconds", [5, pytest.param(20, marks=pytest.mark.long)])
def test_an_owner_that_stands_still_for_a_while_goes_on(shoal, seconds):
    running = shoal.start_training(*ASYNC, "--set", "steps=60")
    running.wait_for_step(5)
    os.kill(running.ranks()[1], signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(running.ranks()[1], signal.SIGCONT)
    done = running.finish()
    assert done.status == 0
    assert complete(shoal.lines("staleness.jsonl"), 60)


SERVED = ("--strategy", "dp3/async:2:servers=1", *ASYNC[2:])
FAR = ("--set", "checkpoint.every=3000 steps", "--set", "evaluate.every=3000 steps")


def told(shoal, event):
    return [each for each in shoal.lines("events.jsonl") if each["event"] == event]


@pytest.mark.parametrize("seconds", [5, pytest.param(20, marks=pytest.mark.long)])
def test_others_go_on_while_a_worker_stands_still_and_what_it_held_counts_once(shoal, seconds):
    running = shoal.start_training(*SERVED, *FAR, "--set", "steps=1900")
    running.wait_for_step(5)
    stopped = running.ranks()[2]
    os.kill(stopped, signal.SIGSTOP)
    woken_at = time.monotonic() + seconds
    # What it holds holds up the others no further than the bound, and not for long.
    running.wait_until(lambda: told(shoal, "taken back"))
    step = told(shoal, "taken back")[0]["step"]
    running.wait_for_step(step + 20)
    time.sleep(max(0.0, woken_at - time.monotonic()))
    os.kill(stopped, signal.SIGCONT)
    running.wait_until(lambda: told(shoal, "discarded"))
    woken = shoal.lines("staleness.jsonl")[-1]["step"]
    running.wait_until(
        lambda: any(
            line["worker"] == 2 and line["step"] > woken for line in shoal.lines("staleness.jsonl")
        )
    )
    running.process.send_signal(signal.SIGTERM)
    done = running.finish()
    assert done.status == 75
    ledger = shoal.lines("staleness.jsonl")
    assert complete(ledger, done.document["steps"])
    assert [told(shoal, each)[0]["rank"] for each in ("taken back", "discarded")] == [2, 2]
    # Nothing of the stopped worker's was applied between.
    assert not [
        line for line in ledger if line["worker"] == 2 and step + 3 < line["step"] <= step + 20
    ]


BOUNDARIES = ("--set", "checkpoint.every=20 steps", "--set", "evaluate.every=30 steps")


def test_others_go_on_without_a_worker_that_is_killed_and_it_rejoins_at_a_checkpoint(shoal):
    running = shoal.start_training(*SERVED, *BOUNDARIES, "--set", "steps=60")
    running.wait_for_step(22)
    os.kill(running.ranks()[2], signal.SIGKILL)
    done = running.finish()
    assert done.status == 0
    assert (done.document["state"], done.document["steps"]) == ("done", 60)
    assert "killed" not in done.errors
    (lost,), (rejoined,) = told(shoal, "lost"), told(shoal, "rejoined")
    assert lost["rank"] == rejoined["rank"] == 2
    # Step 30 is evaluated: all come to rest there, so it is saved as well.
    assert lost["step"] <= rejoined["step"]
    assert rejoined["step"] == done.document["resumed_from_step"]
    assert rejoined["step"] in (30, 40, 60)
    ledger = shoal.lines("staleness.jsonl")
    assert complete(ledger, 60)
    alone = {
        line["worker"] for line in ledger if lost["step"] + 2 < line["step"] < rejoined["step"]
    }
    assert alone <= {1}
    if rejoined["step"] < 60:
        assert {line["worker"] for line in ledger if line["step"] >= rejoined["step"]} == {1, 2}
    # One run: each step once, each evaluation that was due.
    lines = shoal.lines("metrics.jsonl")
    assert [each["step"] for each in lines if "loss" in each] == list(range(1, 61))
    assert [each["step"] for each in lines if "evaluation" in each] == [30, 60]
    assert shoal.checkpoints()[-1] == "step-000000060"


def test_a_worker_that_is_killed_before_the_end_rejoins_for_the_last_evaluation(shoal):
    running = shoal.start_training(
        *SERVED, "--set", "steps=40", "--set", "checkpoint.every=99 steps"
    )
    running.wait_for_step(20)
    os.kill(running.ranks()[1], signal.SIGKILL)
    done = running.finish()
    assert done.status == 0
    assert told(shoal, "rejoined")[0]["step"] == 40
    assert done.document["metrics"].keys() == {"loss", "accuracy"}
    assert complete(shoal.lines("staleness.jsonl"), 40)


def test_a_stop_without_a_worker_that_was_killed_saves_and_the_run_goes_on(shoal):
    running = shoal.start_training(*SERVED, *FAR, "--set", "steps=1900")
    running.wait_for_step(5)
    os.kill(running.ranks()[2], signal.SIGKILL)
    running.wait_until(lambda: told(shoal, "lost"))
    running.process.send_signal(signal.SIGTERM)
    done = running.finish()
    assert done.status == 75
    stopped_at, total = done.document["steps"], done.document["steps"] + 6
    assert complete(shoal.lines("staleness.jsonl"), stopped_at)
    recipe = shoal.folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("1900", str(total)))
    done = shoal.train(*SERVED, *FAR, "--set", f"steps={total}", "--resume")
    assert done.status == 0
    assert done.document["resumed_from_step"] == stopped_at
    assert complete(shoal.lines("staleness.jsonl"), total)


def test_without_any_worker_left_the_run_goes_on_from_its_newest_checkpoint(shoal):
    options = ("--strategy", "dp2/async:2:servers=1", *ASYNC[2:], *EVERY)
    running = shoal.start_training(*options, "--set", "steps=60")
    running.wait_for_checkpoint(20)
    os.kill(running.ranks()[1], signal.SIGKILL)
    done = running.finish()
    assert done.status == 0
    assert told(shoal, "recovery")[0]["rank"] == 1
    ledger = shoal.lines("staleness.jsonl")
    assert [(line["step"], line["index"]) for line in ledger] == [(step, 0) for step in range(60)]


@pytest.mark.parametrize(
    ("strategy", "victim"), [("dp3/async:2:copies=1", 2), ("dp4/async:2:servers=2:copies=1", 1)]
)
def test_an_owner_may_be_killed_where_another_has_a_copy_of_its_part(shoal, strategy, victim):
    running = shoal.start_training("--strategy", strategy, *ASYNC[2:], *FAR, "--set", "steps=60")
    running.wait_for_step(10)
    os.kill(running.ranks()[victim], signal.SIGKILL)
    done = running.finish()
    assert done.status == 0
    (lost,), (rejoined,) = told(shoal, "lost"), told(shoal, "rejoined")
    assert lost["rank"] == rejoined["rank"] == victim
    # There was no checkpoint before: what was done until then is from the copy.
    assert done.document["resumed_from_step"] == rejoined["step"] >= 10
    each = 3 if victim == 2 else 2
    keys = [(line["step"], line["index"]) for line in shoal.lines("staleness.jsonl")]
    assert keys == [(step, index) for step in range(60) for index in range(each)]


def test_the_death_of_a_server_ends_the_run(shoal):
    options = ("--strategy", "dp3/async:2:servers=2", *ASYNC[2:], *EVERY)
    running = shoal.start_training(*options, "--set", "steps=400")
    running.wait_for_checkpoint(20)
    os.kill(running.ranks()[1], signal.SIGKILL)
    done = running.finish()
    assert done.status == 3
    assert "rank 1" in done.errors
    assert done.document["checkpoint"] is not None
    assert not told(shoal, "lost")


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
