"""Which folder a run gets, and what is written there at its start and its end."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoal.cluster import Cluster
from shoal.errors import DiskFull, RankLost, RunFolderError
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train.folder import (
    Options,
    drop_half_written,
    ended_at_once,
    failed,
    finish,
    open_run,
    start,
    write_report,
)

RESOLVED = SimpleNamespace(strategy=Strategy.parse("dp2"), device="cpu", reasons=("because",))


def recipe(*changes):
    return Recipe.from_dict(
        {
            "name": "r",
            "batch_size": 8,
            "steps": 2,
            "model": "mlp",
            "data": {"train": "digits:train"},
            "objective": "cross_entropy",
            "optimizer": {"name": "sgd", "lr": 0.1},
        }
    ).with_changes(*changes)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begin(options, *changes):
    run = open_run(recipe(*changes), options)
    start(run, recipe(*changes), RESOLVED, Cluster.local(), resume=options.resume)
    return run


def test_folders_are_numbered_or_named(here):
    assert begin(Options()).path == Path("runs/r-0001")
    assert begin(Options()).path == Path("runs/r-0002")
    assert begin(Options(out=Path("mine"))).path == Path("mine")


def test_resume_takes_the_newest_unfinished_of_that_name(here):
    runs = [begin(Options()) for _ in range(3)]
    runs[2].write_summary({**runs[2].summary, "state": "done"})
    assert open_run(recipe(), Options(resume=True)).path == runs[1].path
    assert open_run(recipe(), Options(out=runs[0].path, resume=True)).path == runs[0].path
    with pytest.raises(RunFolderError, match="nothing is left to go on with"):
        open_run(recipe(), Options(out=runs[2].path, resume=True))


def test_resume_needs_the_same_recipe_but_for_how_often_things_happen(here):
    begin(Options(out=Path("mine")))
    again = Options(out=Path("mine"), resume=True)
    changes = ("checkpoint.every=7 steps", "evaluate.every=3 steps")
    run = begin(again, *changes)
    # The folder's recipe is the one that it goes on with.
    assert run.recipe == recipe(*changes)
    with pytest.raises(RunFolderError, match=r"seed: 1 here, 0 there"):
        open_run(recipe("seed=1"), again)


def test_what_is_there_is_not_written_over(here):
    begin(Options(out=Path("mine")))
    with pytest.raises(RunFolderError, match="mine holds a run of this recipe"):
        open_run(recipe(), Options(out=Path("mine")))
    with pytest.raises(RunFolderError, match=r"another recipe \('r'\)"):
        open_run(recipe("seed=1"), Options(out=Path("mine")))
    with Run(Path("mine")).lock(), pytest.raises(RunFolderError, match="in use by process"):
        open_run(recipe(), Options(out=Path("mine")))


def test_from_start_to_finish(here):
    run = begin(Options())
    assert run.summary["state"] == "running"
    assert run.summary["choices"] == ["because"]
    absolute = str(run.checkpoints_path.resolve() / "step-000000002")
    document = finish(run, RESOLVED, {"state": "done", "steps": 2, "checkpoint": absolute})
    assert document == run.summary
    assert document["checkpoint"] == "runs/r-0001/checkpoints/step-000000002"
    assert [event["event"] for event in run.events()] == ["start", "done"]
    assert write_report(run) is None
    assert run.report_path.is_file()


def test_a_failure_is_written_down(here):
    run = begin(Options())
    error = RankLost("process 7 was killed by SIGKILL", rank=1)
    document = failed(run, RESOLVED, error, {"resumed_from_step": 1})
    assert document == run.summary
    assert document["state"] == "failed"
    assert document["error"]["kind"] == "RankLost"
    assert "traceback" not in document["error"]
    assert document["resumed_from_step"] == 1
    assert run.events()[-1]["rank"] == 1


def test_a_failure_that_cannot_be_written_down_still_has_its_document(here, monkeypatch):
    run = begin(Options())

    def full(*_arguments, **_options):
        raise DiskFull("no space left")

    for name in ("log_event", "write_summary"):
        monkeypatch.setattr(Run, name, full)
    document = failed(run, RESOLVED, DiskFull("metrics.jsonl cannot be written to"), {})
    assert document["state"] == "failed"
    assert document["reason"] == "metrics.jsonl cannot be written to"
    assert ended_at_once(run, RESOLVED, "why")["state"] == "stopped"
    assert json.loads((run.path / "run.json").read_text())["state"] == "running"


def test_a_report_that_cannot_be_written_is_a_warning(here):
    run = begin(Options())
    (run.path / "report.html").mkdir()
    assert write_report(run).startswith("the report could not be written: ")


def test_what_lost_ranks_were_writing_is_removed(here):
    run = begin(Options())
    half = run.checkpoints_path / ".step-000000003.tmp"
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"12")
    whole = run.checkpoints_path / "step-000000002"
    whole.mkdir()
    drop_half_written(run)
    assert list(run.checkpoints_path.iterdir()) == [whole]
