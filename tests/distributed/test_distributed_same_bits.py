"""The same bits again: in a second run, and in one that was stopped and went on in new processes.

Each rank does all that it does in a run of `train`.
"""

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.checkpoint import Checkpoint
from shoal.cluster import Cluster
from shoal.launch import Context
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train.entry import run_on_rank

STEPS = 6
# Recipe and ranks. (Batch norm on 4 ranks costs seconds, and adds nothing to 3.)
CELLS = [("resnet", 2), ("resnet", 3), ("group-norm", 4), ("transformer", 3)]


class _StopIn(threading.Event):
    """Asked once a step whether to stop; says so in the `number`-th."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self._left = number

    def is_set(self) -> bool:
        self._left -= 1
        return self._left == 0


def _stopping(context: Context, at: int | None, task: dict[str, Any]) -> Any:
    """A rank's whole part of a run; asked to stop in step `at`, counted from 1."""
    if at is not None:
        context = replace(context, stop_requested=_StopIn(at))
    return run_on_rank(context, task)


RESNET = {
    "model": {"name": "resnet", "depth": 18, "width": 4},
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.001},
}
TRANSFORMER = {
    "model": {
        "name": "transformer",
        "features": 8,
        "length": 8,
        "width": 32,
        "layers": 2,
        "dropout": 0.2,
    },
    "optimizer": {"name": "adamw", "lr": 0.01, "clip_norm": 1.0},
    "schedule": {"name": "cosine", "warmup": 0.2},
}
RECIPES = {
    "resnet": RESNET,
    "group-norm": {**RESNET, "model": {**RESNET["model"], "norm": "group"}},
    "transformer": TRANSFORMER,
}


def recipe(name: str) -> Recipe:
    values = {
        "name": name,
        "batch_size": 50,
        "steps": STEPS,
        "data": {"train": "digits:train", "evaluate": None},
        "objective": "cross_entropy",
        "checkpoint": {"every": "2 steps", "keep": 9},
    }
    return Recipe.from_dict(values | RECIPES[name])


Summary = dict[str, Any]
Cell = tuple[str, int]


@dataclass
class Runs:
    """Summaries of runs, by recipe and number of ranks."""

    whole: dict[Cell, Summary]
    again: Summary
    resumed: dict[Cell, Summary]
    on_another_world: Summary


@pytest.fixture(scope="module")
def runs(pool: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Undisturbed runs and stopped ones; then, in new processes, what was stopped goes on."""
    folder = tmp_path_factory.mktemp("runs")

    def train(cell: Cell, out: str, stop: int | None = None, resume: bool = False) -> Summary:
        (name, ranks), path = cell, folder / f"{out}-{cell[0]}"
        if not resume:
            run = Run.create_at(path)
            run.write_inputs(recipe(name), Strategy.parse(f"dp{ranks}"), Cluster.local())
            run.checkpoints_path.mkdir()
        task = {
            "recipe": recipe(name).to_dict(),
            "strategy": f"dp{ranks}",
            "device": "cpu",
            "run": str(path),
            "resume": resume,
        }
        summary: Summary = pool.call(_stopping, stop, task, ranks=ranks)[0]
        assert summary["state"] == ("done" if stop is None else "stopped")
        return summary

    whole = {cell: train(cell, f"whole-{cell[1]}") for cell in CELLS}
    for cell in CELLS:
        train(cell, f"stopped-{cell[1]}", stop=3)
    train(("resnet", 2), "moved", stop=3)
    pool.close()
    resumed = {cell: train(cell, f"stopped-{cell[1]}", resume=True) for cell in CELLS}
    moved = train(("resnet", 3), "moved", resume=True)
    return Runs(whole, train(("resnet", 3), "again"), resumed, moved)


def final(run: Summary) -> dict[str, Tensor]:
    """Weights, buffers and optimizer state after the last step."""
    checkpoint = Checkpoint.open(Path(run["checkpoint"]))
    assert checkpoint.step == STEPS
    return {name: checkpoint.read(name) for name in checkpoint.names}


def differing(left: Summary, right: Summary) -> list[str]:
    ours, theirs = final(left), final(right)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 50
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(("name", "ranks"), CELLS)
def test_a_resumed_run_ends_in_the_same_bits(runs: Runs, name: str, ranks: int) -> None:
    resumed = runs.resumed[name, ranks]
    assert resumed["resumed_from_step"] == 3
    assert differing(resumed, runs.whole[name, ranks]) == []


def test_a_run_in_other_processes_ends_in_the_same_bits(runs: Runs) -> None:
    assert differing(runs.again, runs.whole["resnet", 3]) == []


def test_another_number_of_ranks_goes_on(runs: Runs) -> None:
    """The sums are in another order, so the bits are others; the training is the same."""
    moved, whole = runs.on_another_world, runs.whole["resnet", 3]
    assert moved["resumed_from_step"] == runs.resumed["resnet", 2]["resumed_from_step"]
    assert differing(moved, whole) != []
    theirs = final(whole)
    for name, ours in final(moved).items():
        if ours.is_floating_point():
            torch.testing.assert_close(ours, theirs[name], rtol=1e-2, atol=1e-3, msg=name)
    assert moved["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=1e-3)


@pytest.mark.parametrize(("name", "ranks"), CELLS)
def test_gradient_bytes_are_four_a_parameter_and_step(runs: Runs, name: str, ranks: int) -> None:
    run = runs.whole[name, ranks]
    tensors = final(run)
    state = "exp_avg" if name == "transformer" else "momentum_buffer"
    parameters = sum(t.numel() for key, t in tensors.items() if key.endswith("/" + state))
    sent = run["comm_bytes"]["all_reduce"]
    assert sent["gradient"] == [4 * parameters * STEPS] * ranks
