"""The document of a run at its start and after a failure, and progress that nobody reads."""

from pathlib import Path
from types import SimpleNamespace

from shoal.report.live import PlainView
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train.document import known, placed, so_far

KEYS = {
    "run", "state", "strategy", "world_size", "steps", "samples", "seconds", "samples_per_second",
    "metrics", "peak_memory_bytes", "comm_bytes", "timings", "versions", "checkpoint",
    "resumed_from_step",
}  # fmt: skip


def test_every_key_of_the_contract_is_there_from_the_start(tmp_path):
    resolved = SimpleNamespace(strategy=Strategy.parse("dp2"), device="cpu", reasons=("why",))
    document = known(Run(tmp_path), resolved)
    assert document.keys() >= KEYS
    assert document["state"] == "running"
    assert document["versions"].keys() == {"shoal", "torch", "python"}


def test_versions_are_those_of_what_is_installed(tmp_path):
    import torch

    from shoal.train.document import versions

    assert versions()["torch"] == str(torch.__version__)


def test_after_a_failure_the_log_says_how_far_it_went(tmp_path):
    run = Run(tmp_path)
    assert so_far(run) == {"checkpoint": None}
    line = {"step": 1, "samples": 8, "seconds": 0.5, "samples_per_second": 16.0, "loss": 2.0}
    run.log_metrics(line)
    run.log_metrics({**line, "step": 2, "samples": 16})
    run.log_metrics({"step": 2, "evaluation": {"loss": 1.5}})
    for step in (1, 2):
        (run.checkpoints_path / f"step-{step:09d}").mkdir(parents=True)
    assert so_far(run) == {
        "steps": 2, "samples": 16, "seconds": 0.5, "samples_per_second": 16.0,
        "metrics": {"loss": 1.5}, "checkpoint": str(run.checkpoints_path / "step-000000002"),
    }  # fmt: skip


def test_a_damaged_log_does_not_hide_the_failure(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{no json\n")
    assert so_far(Run(tmp_path)) == {"checkpoint": None}


def test_paths_are_as_the_run_was_given():
    run = Run(Path("runs/x"))
    summary = {"checkpoint": "/somewhere/runs/x/checkpoints/step-000000004"}
    assert placed(run, summary)["checkpoint"] == "runs/x/checkpoints/step-000000004"
    assert placed(run, {"checkpoint": None}) == {"checkpoint": None}


class Closed:
    """A stream whose reader has gone."""

    def write(self, _text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_progress_that_nobody_reads_is_no_fault():
    with PlainView(Closed()) as view:
        view.show({"kind": "event", "event": "choice", "message": "x"})
