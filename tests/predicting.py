"""Small runs to predict with, trained on one rank in the test's own process."""

import threading
from pathlib import Path
from typing import Any

import torch

from shoal.cluster import Cluster
from shoal.launch import Context
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train.rank import Task, train_on_rank

RECIPE: dict[str, Any] = {
    "name": "small",
    "batch_size": 100,
    "steps": 12,
    "model": {"name": "mlp", "widths": [16]},
    "data": {"train": "digits:train"},
    "objective": "cross_entropy",
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "evaluate": {"every": "100 steps"},
}


def trained(folder: Path, strategy: str = "single", **changes: Any) -> Run:
    recipe = Recipe.from_dict({**RECIPE, **changes})
    run = Run.create_at(folder)
    run.write_inputs(recipe, Strategy.parse(strategy), Cluster.local())
    context = Context(0, 1, 0, "file:/nowhere", "test", 1, lambda _: None, threading.Event())
    threads = torch.get_num_threads()
    train_on_rank(context, Task(recipe.to_dict(), strategy, "cpu", str(folder), False))
    torch.set_num_threads(threads)
    return run
