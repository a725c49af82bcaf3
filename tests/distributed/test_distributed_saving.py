"""A save that fails beside training: one error on all ranks, at one step, and the older one stays.

The ranks' threads meet over connections of their own, while the steps go on over the others.
"""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shoal.checkpoint import Checkpoint, files, list_checkpoints
from shoal.cluster import Cluster
from shoal.errors import ShoalError
from shoal.launch import Context
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train import team
from shoal.train.entry import run_on_rank

RECIPE = {
    "name": "saving",
    "batch_size": 50,
    "steps": 1000,
    "model": {"name": "mlp", "widths": [16]},
    "data": {"train": "digits:train", "evaluate": None},
    "objective": "cross_entropy",
    "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    "checkpoint": {"every": "200 steps", "keep": 9},
}


class _FullAt:
    """`os.write` on one rank, which finds no space for the checkpoint of `step`, after a while."""

    def __init__(self, step: int) -> None:
        self._name = f".step-{step:09d}.tmp"
        self._write = os.write

    def __call__(self, descriptor: int, data: memoryview) -> int:
        if self._name in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            time.sleep(0.05)  # the other ranks' steps go on, and wait for this rank's
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(descriptor, data)


def _failing(context: Context, rank: int, at: int, task: dict[str, Any]) -> dict[str, Any]:
    """A rank's part of a run; `rank` cannot write at `at`. What it raised, and in which step."""
    done: list[int] = []
    step, write = team.train_step, os.write

    def counted(job: Any, number: int, *others: Any) -> Any:
        result = step(job, number, *others)
        done.append(number + 1)
        time.sleep(0.005)  # so that what fails in a thread is found well before the next save
        return result

    team.train_step = counted
    if context.rank == rank:
        files.os.write = _FullAt(at)  # type: ignore[assignment]
    try:
        run_on_rank(context, task)
    except ShoalError as error:
        return {"error": error.to_json() | {"traceback": None}, "steps": done[-1]}
    finally:
        team.train_step, files.os.write = step, write
        if dist.is_initialized():
            dist.destroy_process_group()
    return {"error": None, "steps": done[-1]}


@pytest.mark.parametrize(("ranks", "rank"), [(2, 1), (3, 0)])
def test_all_ranks_raise_one_error_at_one_step(
    pool: Any, tmp_path: Path, ranks: int, rank: int
) -> None:
    recipe = Recipe.from_dict(RECIPE)
    run = Run.create_at(tmp_path / "run")
    run.write_inputs(recipe, Strategy.parse(f"dp{ranks}"), Cluster.local())
    task = {
        "recipe": recipe.to_dict(),
        "strategy": f"dp{ranks}",
        "device": "cpu",
        "run": str(run.path),
        "resume": False,
    }
    found = pool.call(_failing, rank, 400, task, ranks=ranks)
    assert all(each == found[0] for each in found)
    error = found[0]["error"]
    assert (error["kind"], error["rank"], error["step"]) == ("DiskFull", rank, 400)
    # Found between two saves, while training went on.
    assert 400 < found[0]["steps"] < 600
    assert list_checkpoints(run.checkpoints_path) == (200,)
    Checkpoint.open(run.checkpoints_path / "step-000000200").verify()
    assert [path.name for path in run.checkpoints_path.iterdir()] == ["step-000000200"]
