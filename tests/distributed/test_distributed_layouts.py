"""A run stopped under one layout goes on under another: same bits after the move, same result."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from shoal.checkpoint import Checkpoint
from shoal.cluster import Cluster
from shoal.launch import Context
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train import team
from shoal.train.commit import Committer
from shoal.train.entry import run_on_rank
from shoal.train.step import Flags
from shoal.train.stop import Convergence

RECIPE = {
    "name": "moving",
    "batch_size": 50,
    "steps": 10,
    "model": {"name": "transformer", "width": 16, "heads": 4, "layers": 2, "dropout": 0.1}
    | {"features": 8, "length": 8},
    "data": {"train": "digits:train"},
    "objective": "cross_entropy",
    "optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.1, "clip_norm": 1.0},
    "checkpoint": {"every": "100 steps", "keep": 9},
}
# From each layout into another; every one is left and entered.
MOVES = ("single", "tp2", "dp2/zero3", "pp2", "dp2/zero1", "pp2.tp2", "dp2", "pp2.dp2/zero1")


def _moved(
    context: Context, task: dict[str, Any], stop_after: int, copy: str | None
) -> dict[str, Any]:
    """A rank's part of a run that is stopped after a step; before its first one it saves again.

    ``copy``: the run folder for that.
    """
    plain = team.train_step
    state = {"first": True}

    def step(job: Any, number: int, *others: Any) -> Any:
        if state["first"] and copy is not None:
            recipe = Recipe.from_dict(task["recipe"])
            again = Committer(
                team.Team((job,)), recipe, Run.open(Path(copy)), "x", lambda _message: None
            )
            again.commit(number, Convergence("loss"), {})
            again.wait()
        state["first"] = False
        if number + 1 == stop_after:
            context.stop_requested.set()
            others = (Flags(stop=1.0), *others[1:])
        return plain(job, number, *others)

    team.train_step = step
    try:
        return run_on_rank(context, task)
    finally:
        team.train_step = plain
        context.stop_requested.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def _part(
    pool: Any, run: Run, strategy: str, stop_after: int, copy: Run | None = None
) -> dict[str, Any]:
    task = {
        "recipe": run.recipe.to_dict(),
        "strategy": strategy,
        "device": "cpu",
        "run": str(run.path),
        "resume": copy is not None,
    }
    ranks = Strategy.parse(strategy).world_size
    where = None if copy is None else str(copy.path)
    summaries = pool.call(_moved, task, stop_after, where, ranks=ranks)
    return dict(summaries[0])


def _made(path: Path) -> Run:
    run = Run.create_at(path)
    run.write_inputs(Recipe.from_dict(RECIPE), Strategy.parse("dp2"), Cluster.local())
    run.checkpoints_path.mkdir()
    return run


def _tensors(run: Run, step: int) -> dict[str, Any]:
    checkpoint = Checkpoint.open(run.checkpoints_path / f"step-{step:09d}")
    checkpoint.verify()
    return {name: checkpoint.read(name) for name in checkpoint.names}


@pytest.mark.timeout(240)
def test_a_run_goes_through_all_layouts_without_a_bit_lost(pool: Any, tmp_path: Path) -> None:
    run, plain = _made(tmp_path / "run"), _made(tmp_path / "plain")
    undisturbed = _part(pool, plain, "single", 0)
    assert (undisturbed["state"], undisturbed["steps"]) == ("done", RECIPE["steps"])
    _part(pool, run, MOVES[0], 1)
    for step, strategy in enumerate(MOVES[1:], 1):
        copy = _made(tmp_path / f"copy-{step}")
        before = _tensors(run, step)
        last = strategy == MOVES[-1]
        summary = _part(pool, run, strategy, 0 if last else step + 1, copy)
        assert summary["resumed_from_step"] == step
        assert summary["steps"] == (RECIPE["steps"] if last else step + 1)
        after = _tensors(copy, step)
        assert before.keys() == after.keys(), strategy
        differ = [name for name in before if not before[name].equal(after[name])]
        assert not differ, f"{strategy}: {differ}"
    expected, found = _tensors(plain, 10), _tensors(run, 10)
    assert expected.keys() == found.keys()
    # AdamW divides by roots of squares: where a gradient is all rounding, so is the update.
    worst = max(float((expected[n] - found[n]).abs().max()) for n in expected)
    assert worst < 1e-3, worst
    assert summary["metrics"]["loss"] == pytest.approx(undisturbed["metrics"]["loss"], rel=1e-4)
    assert summary["metrics"]["accuracy"] == pytest.approx(
        undisturbed["metrics"]["accuracy"], abs=0.01
    )
