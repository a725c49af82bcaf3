"""A run that goes on: from the newest good checkpoint, to the weights of one never disturbed."""

import shutil

import pytest

from shoal.checkpoint import checkpoint_path
from shoal.errors import CheckpointDamaged


def same(left, right):
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def largest_file(small, step):
    folder = checkpoint_path(small.run.checkpoints_path, step)
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def flip_a_byte(small, step):
    file = largest_file(small, step)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def cut_short(small, step):
    file = largest_file(small, step)
    file.write_bytes(file.read_bytes()[:-100])


def leave_half_written(small, step):
    path = checkpoint_path(small.run.checkpoints_path, step)
    (path / "manifest.json").unlink()
    path.rename(path.with_name(f".{path.name}.tmp"))


def test_stopped_and_resumed_is_as_if_nothing_had_been(small, undisturbed):
    stopped = small.train(stop_after=7)
    assert (stopped["state"], stopped["steps"]) == ("stopped", 7)
    assert small.checkpoints == [4, 7]
    done = small.train(resume=True)
    other, summary = undisturbed
    assert done["resumed_from_step"] == 7
    assert done["state"] == "done"
    assert done["metrics"] == summary["metrics"]
    assert done["samples"] == summary["samples"] == 3 * 1437
    assert same(small.weights(12), other.weights(12))
    assert small.steps == list(range(1, 13))


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, leave_half_written])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(small, undisturbed, damage):
    small.train(stop_after=8)
    assert small.checkpoints == [4, 8]
    damage(small, 8)
    done = small.train(resume=True)
    assert done["resumed_from_step"] == 4
    assert same(small.weights(12), undisturbed[0].weights(12))
    (warning,) = [each for each in small.run.events() if each["event"] == "warning"]
    assert "step-000000008" in warning["message"]
    assert "the one before it is used" in warning["message"]
    assert warning["message"] in [each.get("message") for each in small.messages]
    assert small.steps == list(range(1, 13))


def test_all_damaged_is_an_error_that_lists_them(small):
    small.train(stop_after=8)
    for step in (4, 8):
        flip_a_byte(small, step)
    with pytest.raises(CheckpointDamaged, match=r"(?s)step-000000008.*step-000000004"):
        small.train(resume=True)
    assert small.checkpoints == [4, 8]


def test_lines_after_the_loaded_checkpoint_are_cut(small):
    small.train(stop_after=7)
    # As a run leaves them that was killed some steps after its last checkpoint.
    small.add_line("metrics.jsonl", {"step": 8, "loss": 1.0, "samples": 0, "seconds": 0})
    small.add_line("events.jsonl", {"event": "warning", "message": "late", "step": 9})
    small.train(resume=True)
    assert small.steps == list(range(1, 13))
    assert "late" not in [each["message"] for each in small.run.events()]


def test_without_a_checkpoint_it_begins_anew(small, undisturbed):
    small.train("checkpoint.every=100 steps", stop_after=3)
    shutil.rmtree(checkpoint_path(small.run.checkpoints_path, 3))
    done = small.train(resume=True)
    assert done["resumed_from_step"] is None
    assert small.steps == list(range(1, 13))
    assert same(small.weights(12), undisturbed[0].weights(12))


def test_a_run_that_was_killed_after_its_last_checkpoint_only_ends(small):
    small.train("evaluate.every=4 steps")
    again = small.train("evaluate.every=4 steps", resume=True)
    assert (again["state"], again["steps"], again["resumed_from_step"]) == ("done", 12, 12)
    assert again["metrics"].keys() == {"loss", "accuracy"}
    assert again["checkpoint"].endswith("step-000000012")


def test_how_often_to_save_may_change(small):
    small.train(stop_after=4)
    small.train("checkpoint.every=1 step", "checkpoint.keep=9", resume=True)
    assert small.checkpoints == [4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_counts_and_metrics_of_the_first_part_are_carried_over(small):
    first = small.train("evaluate.every=3 steps", stop_after=4)
    assert first["metrics"]
    second = small.train("evaluate.every=100 steps", resume=True, stop_after=1)
    assert second["steps"] == first["steps"] + 1
    assert second["metrics"] == first["metrics"]
    # All but the time of the first part's last save.
    assert second["seconds"] > first["seconds"] / 2
    assert second["best"] == first["best"]
