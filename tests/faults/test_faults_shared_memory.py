"""Ranks that share memory and are killed, stopped, or all killed at once."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)

# All-reduces for ever: rank, size, store, time-out in s, core; rank 0 says when they have begun.
RANK = """
import sys
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from shoal.comm import shared_memory
from shoal.comm.shared_memory import native

rank, size, timeout_s, core = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[4]), sys.argv[5]
torch.set_num_threads(1)
shared_memory.register()
with mock.patch.object(native, "available", return_value=core == "C"):
    dist.init_process_group(
        shared_memory.BACKEND, store=dist.FileStore(sys.argv[3], size), rank=rank, world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
assert dist.group.WORLD.core_name == core
values, calls = torch.ones(300_000), 0
while True:
    try:
        work = dist.all_reduce(values, dist.ReduceOp.MAX, async_op=calls % 2 == 1)
        if work is not None:
            work.wait()
    except RuntimeError as error:
        print(str(error).splitlines()[0], flush=True)
        sys.exit(3)
    calls += 1
    if calls == 10:
        print("going", flush=True)
"""

Ranks = list[subprocess.Popen[str]]


@contextlib.contextmanager
def ranks_of(folder: Path, size: int, timeout_s: float, core: str) -> Iterator[Ranks]:
    """Processes that are in the middle of collectives."""
    arguments = [str(size), str(folder / "store"), str(timeout_s), core]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), *arguments],
            env={**os.environ, "TMPDIR": str(folder)},  # what they leave is seen there
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        for each in started:
            assert each.stdout is not None
            assert each.stdout.readline() == "going\n"
        yield started
    finally:
        for each in started:
            each.kill()
            each.wait()
            if each.stdout is not None:
                each.stdout.close()


def last_words(rank: subprocess.Popen[str]) -> str:
    said, _ = rank.communicate()
    return said.strip()


CORES = pytest.mark.parametrize("core", ["C", "Python"])


@CORES
def test_a_killed_rank_is_named_by_the_others(tmp_path: Path, core: str) -> None:
    with ranks_of(tmp_path, 3, 100, core) as ranks:
        ranks[1].kill()
        said = [last_words(ranks[0]), last_words(ranks[2])]
    # One of them may have seen that the other has left, which says on whose account.
    words = f"peer lost: rank 1 (process {ranks[1].pid}) has ended; it had not arrived at"
    assert any(words in each for each in said)
    assert all(words in each or "on account of rank 1" in each or "has ended" in each
               for each in said)  # fmt: skip
    assert all("of 300000 float32" in each for each in said)


@CORES
def test_a_stopped_rank_runs_into_the_time_out(tmp_path: Path, core: str) -> None:
    with ranks_of(tmp_path, 2, 1, core) as ranks:
        os.kill(ranks[1].pid, signal.SIGSTOP)
        said = last_words(ranks[0])
    assert "peer lost: rank 1 has not arrived at collective " in said
    assert said.endswith("within 1 s")


def left_over() -> set[str]:
    """What ranks could have left: folders of other tests that run beside come and go in /tmp."""
    others = ("shoal-verify-", "shoal-predict-", "shoal-bench-")
    return {
        str(path)
        for folder in (Path("/dev/shm"), Path("/tmp"))
        for path in folder.iterdir()
        if "shoal" in path.name and not path.name.startswith(others)
    }


@CORES
def test_nothing_is_left_when_all_are_killed(tmp_path: Path, core: str) -> None:
    before = left_over()
    with ranks_of(tmp_path, 2, 100, core) as ranks:
        maps = Path(f"/proc/{ranks[0].pid}/maps").read_text()
        assert "/memfd:shoal-collectives (deleted)" in maps
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
    assert left_over() <= before
    assert {path.name for path in tmp_path.iterdir()} <= {"store"}  # the test's own


def test_the_run_says_what_carried_it(shoal) -> None:  # type: ignore[no-untyped-def]
    done = shoal.train("--strategy", "dp2")
    assert done.document["comm"].startswith("shared_memory")
    done = shoal.run("train", "tiny.yaml", "--strategy", "dp2", "--comm", "gloo", "--out", "other",
                     "--json")  # fmt: skip
    assert done.document["comm"] == "gloo"
    done = shoal.run("train", "tiny.yaml", "--comm", "pigeons")
    assert done.status == 2
    assert "'pigeons' is not one of 'auto', 'shm', 'gloo'" in done.errors
