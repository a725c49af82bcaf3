"""Run folders as a user meets them: finished, in use, of another recipe, damaged; and scripts."""

import signal
import sys
import time

import pytest
from shoal_process import Shoal, equal, weights

pytestmark = [pytest.mark.timeout(150), pytest.mark.xdist_group("runs")]

# The contract's document of `train`.
KEYS = {
    "run", "state", "strategy", "world_size", "steps", "samples", "seconds", "samples_per_second",
    "metrics", "peak_memory_bytes", "comm_bytes", "timings", "versions", "checkpoint",
    "resumed_from_step",
}  # fmt: skip


DP2 = ("--strategy", "dp2", "--set", "model={name: 'slow:held', at: 7}")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a run of two ranks that nobody disturbed, and what the command has said."""
    shoal = Shoal(tmp_path_factory.mktemp("finished"))
    return shoal, shoal.train(*DP2, "--set", "evaluate.every=6 steps")


def test_stopped_by_sigterm_and_resumed_ends_in_the_same_weights(shoal, finished):
    (shoal.folder / "hold").touch()
    running = shoal.start_training(*DP2)
    running.wait_for_step(6)
    running.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    (shoal.folder / "hold").unlink()
    done = running.finish()
    assert done.status == 75
    assert done.document["state"] == "stopped"
    assert done.document["checkpoint"] == "run/checkpoints/step-000000008"
    assert "resume  shoal train run/recipe.yaml" in done.errors

    done = shoal.train(*DP2, "--resume")
    assert done.status == 0
    assert done.document["resumed_from_step"] == 8
    assert done.document["samples"] == 144
    undisturbed = finished[0].folder / "run"
    assert equal(weights(shoal.folder / "run", 12), weights(undisturbed, 12))
    steps = [line["step"] for line in shoal.lines("metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 13))


def test_the_document_has_every_key_of_the_contract(finished):
    shoal, done = finished
    document = done.document
    assert done.status == 0
    assert document.keys() >= KEYS
    assert document == shoal.summary()
    assert (document["state"], document["steps"], document["samples"]) == ("done", 12, 144)
    assert document["world_size"] == len(document["peak_memory_bytes"]) == 2
    assert document["metrics"].keys() == {"loss", "accuracy"}
    # 111 parameters in float32, once a step from each rank.
    assert document["comm_bytes"]["all_reduce"]["gradient"] == [12 * 111 * 4] * 2
    assert document["timings"]["step"] > 0
    assert document["run"] == "run"
    assert document["checkpoint"] == "run/checkpoints/step-000000012"
    assert document["resumed_from_step"] is None
    assert document["versions"].keys() == {"shoal", "torch", "python"}


def test_the_folder_has_what_is_promised(finished):
    shoal, done = finished
    names = {path.name for path in (shoal.folder / "run").iterdir()} - {".lock"}
    assert names == {
        "recipe.yaml", "strategy.json", "cluster.json", "run.json", "metrics.jsonl",
        "events.jsonl", "checkpoints", "report.html",
    }  # fmt: skip
    assert [each["event"] for each in shoal.lines("events.jsonl")] == ["start", "done"]
    # The newest two; step 6, better than any before it, was the best for a while.
    assert shoal.checkpoints() == ["step-000000008", "step-000000012"]
    assert "done after 12 steps" in done.errors
    assert "report  run/report.html" in done.errors


def test_a_finished_run_is_exported_and_loads_into_the_plain_model(finished):
    import safetensors.torch
    from torch import nn

    shoal, _ = finished
    done = shoal.run("export", "run", "--out", "weights/model.safetensors", "--json")
    assert done.status == 0
    assert done.document["out"] == "weights/model.safetensors"
    file = shoal.folder / done.document["out"]
    assert done.document["bytes"] == file.stat().st_size
    weights = safetensors.torch.load_file(file)
    assert done.document["tensors"] == len(weights)
    nn.ModuleDict({"linear": nn.Linear(36, 3)}).load_state_dict(weights)


def test_what_cannot_be_exported_is_said(finished):
    shoal, _ = finished
    for arguments, words in (
        (("nothing-here", "--out", "a.safetensors"), "nothing-here"),
        (("run", "--out", "run"), "run is a folder, and weights go into one file"),
    ):
        done = shoal.run("export", *arguments)
        assert done.status == 2
        assert words in done.errors
        assert "Traceback" not in done.errors


def test_a_finished_run_is_not_resumed(finished):
    shoal, _ = finished
    done = shoal.train(*DP2, "--resume")
    assert done.status == 2
    assert "run is done after 12 steps: nothing is left to go on with" in done.errors
    assert shoal.summary()["state"] == "done"


@pytest.mark.parametrize("resume", [False, True])
def test_the_folder_of_another_recipe_is_refused(finished, resume):
    shoal, _ = finished
    options = [*DP2, "--set", "seed=5", *(["--resume"] if resume else [])]
    done = shoal.train(*options)
    assert done.status == 2
    assert "another recipe" in done.errors
    assert ("seed: 5 here, 0 there" in done.errors) == resume


def test_the_folder_of_this_recipe_is_not_written_over(finished):
    done = finished[0].train(*DP2)
    assert done.status == 2
    assert "run holds a run of this recipe" in done.errors
    assert "--resume" in done.errors


def test_stopped_used_resumed_without_a_name(shoal):
    options = ("--strategy", "single", "--set", "model={name: 'slow:held', at: 7}")
    (shoal.folder / "hold").touch()
    running = shoal.start("train", "tiny.yaml", *options, "--json")
    running.wait_for_step(6, "runs/tiny-0001")
    taken = shoal.run("train", "tiny.yaml", *options, "--resume")
    assert taken.status == 2
    assert f"is in use by process {running.process.pid}" in taken.errors
    taken = shoal.run("train", "tiny.yaml", *options, "--out", "runs/tiny-0001")
    assert taken.status == 2
    assert f"is in use by process {running.process.pid}" in taken.errors
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    (shoal.folder / "hold").unlink()
    stopped = running.finish()
    assert stopped.status == 75
    assert stopped.document["checkpoint"] == "runs/tiny-0001/checkpoints/step-000000008"
    # The newest checkpoint has a wrong bit: it is named, and the one before it is used.
    newest = shoal.folder / stopped.document["checkpoint"]
    file = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    done = shoal.run(
        "train", "tiny.yaml", *options, "--resume", "--set", "checkpoint.every=1 step", "--json"
    )
    assert done.status == 0, done
    assert done.document["run"] == "runs/tiny-0001"
    assert done.document["steps"] == 12
    assert newest.name in done.errors
    assert done.document["resumed_from_step"] == 4
    assert shoal.checkpoints("runs/tiny-0001")[-2:] == ["step-000000011", "step-000000012"]
    done = shoal.run("train", "tiny.yaml", *options, "--resume")
    assert done.status == 2
    assert "runs has no unfinished run of tiny: it has tiny-0001 (done)" in done.errors


SCRIPT = """
import shoal
recipe = shoal.Recipe.from_yaml("tiny.yaml")
run = shoal.train(recipe, strategy="dp2", out="from-script")
print(run.path, run.summary["state"], run.summary["world_size"])
try:
    shoal.train(recipe, strategy="dp2", out="from-script")
except shoal.errors.RunFolderError as error:
    print(error.exit_status)
"""


def test_a_plain_script_without_a_main_guard(shoal):
    (shoal.folder / "script.py").write_text(SCRIPT)
    done = shoal.run(command=(sys.executable, "script.py"))
    assert done.status == 0, done
    assert done.output.splitlines() == ["from-script done 2", "2"]
    assert "done (all steps done)" in done.errors
