import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.cluster import Cluster
from shoal.errors import DiskFull, RunFolderError
from shoal.recipe import Recipe
from shoal.run import Run, newest_unfinished
from shoal.strategy import Strategy

HOLD = """
import sys
from pathlib import Path
from shoal.run import Run
with Run(Path(sys.argv[1])).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def finished(root: Path, name: str, state: str | None) -> Run:
    run = Run.create(root, name)
    for file in ("recipe.yaml", "strategy.json", "cluster.json"):
        (run.path / file).write_text("{}")
    if state is not None:
        run.write_summary({"state": state})
    return run


def test_numbers_go_up_and_names_do_not_mix(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "runs"
    assert Run.create(root, "digits").path == root / "digits-0001"
    assert Run.create(root, "digits-wide").path == root / "digits-wide-0001"
    (root / "digits-0041").mkdir()
    (root / "digits-latest").mkdir()
    assert Run.create(root, "digits").name == "digits-0042"


def test_creators_at_once_get_different_folders(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def create(_: int) -> Path:
        barrier.wait(10)
        return Run.create(tmp_path, "digits").path

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(create, range(8)))
    assert sorted(path.name for path in paths) == [f"digits-{i:04d}" for i in range(1, 9)]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_names_that_no_folder_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunFolderError, match="cannot be named"):
        Run.create(tmp_path, name)


def test_create_at_wants_an_empty_folder(tmp_path: Path) -> None:
    assert Run.create_at(tmp_path / "new").path == tmp_path / "new"
    assert Run.create_at(tmp_path / "new").path == tmp_path / "new"
    (tmp_path / "new" / "thesis.tex").write_text("!")
    with pytest.raises(RunFolderError, match=r"is not empty: it holds thesis\.tex"):
        Run.create_at(tmp_path / "new")
    with pytest.raises(RunFolderError, match="cannot be written to"):
        Run.create_at(tmp_path / "new" / "thesis.tex")


def test_open_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not there") as caught:
        Run.open(tmp_path / "nothing")
    assert caught.value.exit_status == 2
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="is a file"):
        Run.open(tmp_path / "file")
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(RunFolderError, match=r"it has no strategy\.json, cluster\.json"):
        Run.open(tmp_path)


def test_the_inputs_come_back(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        {
            "name": "digits",
            "seed": 0,
            "batch_size": 128,
            "epochs": 2,
            "model": "resnet",
            "data": {"train": "digits:train"},
            "objective": "cross_entropy",
            "optimizer": {"name": "sgd", "lr": 0.1},
        }
    )
    strategy, cluster = Strategy.parse("dp2+bf16"), Cluster.local()
    run = Run.create(tmp_path, "digits")
    run.write_inputs(recipe, strategy, cluster)
    opened = Run.open(run.path)
    assert (opened.recipe, opened.strategy, opened.cluster) == (recipe, strategy, cluster)


def test_the_summary_is_replaced_and_valid_json(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.summary == {}
    run.write_summary({"state": "running"})
    run.write_summary({"loss": float("nan"), "memory": (1, float("inf")), "metrics": {"a": 0.5}})
    assert run.summary == {"loss": None, "memory": [1, None], "metrics": {"a": 0.5}}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    with pytest.raises(TypeError):
        run.write_summary({"x": object()})
    assert run.summary["metrics"] == {"a": 0.5}
    (tmp_path / "run.json").write_text('{"state"')
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        _ = run.summary
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(RunFolderError, match="holds no mapping"):
        _ = run.summary


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=4))
def test_lines_round_trip(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    run = Run(tmp_path)
    for line in lines:
        run.log_metrics(line)
    expected = json.loads(json.dumps(lines), parse_constant=lambda name: None)
    assert run.metrics() == expected


def test_events_have_time_and_place(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.events() == []
    run.log_event("start", "training begins")
    run.log_event("fault", "loss is NaN", rank=1, step=40, phase="backward")
    start, fault = run.events()
    assert start["rank"] is None
    assert 0 <= fault.pop("time") - start["time"] < 60
    assert fault == {
        "event": "fault",
        "message": "loss is NaN",
        "rank": 1,
        "step": 40,
        "phase": "backward",
    }


@pytest.mark.parametrize("cut", [1, 5, 11])
def test_a_half_written_last_line_is_dropped_and_then_repaired(tmp_path: Path, cut: int) -> None:
    run, file = Run(tmp_path), tmp_path / "metrics.jsonl"
    run.log_metrics({"step": 1})
    run.log_metrics({"step": 2})
    file.write_bytes(file.read_bytes()[:-cut])
    assert run.metrics() == [{"step": 1}]
    run.log_metrics({"step": 3})
    assert run.metrics() == [{"step": 1}, {"step": 3}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl:2 is damaged"):
        Run(tmp_path).metrics()
    (tmp_path / "metrics.jsonl").write_text("3\n")
    with pytest.raises(RunFolderError, match="holds no mapping"):
        Run(tmp_path).metrics()


def test_cut_after_a_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.cut_after(3)
    for step in range(1, 6):
        run.log_metrics({"step": step, "loss": float("nan")})
    run.log_event("start", "begins")
    run.log_event("fault", "late", step=5)
    run.log_event("checkpoint", "saved", step=3)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6')
    run.cut_after(3)
    assert [line["step"] for line in run.metrics()] == [1, 2, 3]
    assert [event["event"] for event in run.events()] == ["start", "checkpoint"]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("}\n")
    run.cut_after(0)
    assert run.metrics() == []


def test_a_full_disk_is_said_in_words() -> None:
    run = Run(Path("/dev"))
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    from shoal.run import Lines

    with pytest.raises(DiskFull, match="No space left on device"):
        Lines(Path("/dev/full")).add({"step": 1})
    assert run.name == "dev"


def test_a_folder_in_use_names_the_process_and_its_end_frees_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RunFolderError, match=f"in use by process {holder.pid}"),
            Run(tmp_path).lock(),
        ):
            pytest.fail("two processes hold one folder")
        holder.kill()
        holder.wait()
    with Run(tmp_path).lock():
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(RunFolderError, match=str(os.getpid())), Run(tmp_path).lock():
            pytest.fail("one process holds it twice")
    with Run(tmp_path).lock():
        pass


def test_a_child_that_outlives_the_holder_has_no_lock(tmp_path: Path) -> None:
    code = HOLD.replace("import sys", "import subprocess\nimport sys").replace(
        'print("held"',
        'child = subprocess.Popen(["sleep", "60"], close_fds=False); print(child.pid',
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            holder.kill()
            holder.wait()
            with Run(tmp_path).lock():
                os.kill(child, 0)  # it lives, and the folder is free
        finally:
            os.kill(child, signal.SIGKILL)


def test_an_error_inside_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Run(tmp_path).lock():
        _ = 1 / 0
    with Run(tmp_path).lock():
        pass


def test_the_newest_unfinished(tmp_path: Path) -> None:
    finished(tmp_path, "digits", "stopped")
    middle = finished(tmp_path, "digits", None)  # killed before its first summary
    finished(tmp_path, "digits", "done")
    finished(tmp_path, "digits-wide", "failed")
    (tmp_path / "digits-0009").mkdir()
    assert newest_unfinished(tmp_path, "digits") == middle


def test_nothing_unfinished_says_what_is_there(tmp_path: Path) -> None:
    finished(tmp_path, "digits", "done")
    (tmp_path / "digits-0009").mkdir()
    with pytest.raises(RunFolderError) as caught:
        newest_unfinished(tmp_path, "digits")
    assert "digits-0009 (no run folder), digits-0001 (done)" in caught.value.message
    assert caught.value.exit_status == 2
    with pytest.raises(RunFolderError, match="none of that name"):
        newest_unfinished(tmp_path, "mnist")
    with pytest.raises(RunFolderError, match="no such folder"):
        newest_unfinished(tmp_path / "nothing", "mnist")


def test_the_module_needs_no_torch() -> None:
    code = "import sys, shoal.run, shoal.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
