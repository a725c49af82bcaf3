"""A small run on one rank, in the process of the test itself."""

import itertools
import json

import pytest

from shoal.cluster import Cluster
from shoal.launch import Context
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train.rank import Task, train_on_rank

RECIPE = {
    "name": "small",
    "batch_size": 360,
    "steps": 12,
    "model": {"name": "mlp", "widths": [8]},
    "data": {"train": "digits:train"},
    "objective": "cross_entropy",
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
    "evaluate": {"every": "100 steps"},
    "checkpoint": {"every": "4 steps", "keep": 2},
}


class StopInStep:
    """Asked once a step whether to stop; says so in the `number`-th."""

    def __init__(self, number):
        self._asked = itertools.count(1)
        self._number = number

    def is_set(self):
        return next(self._asked) == self._number


class Small:
    """A run in `folder`; each call of :meth:`train` is one life of it."""

    def __init__(self, folder):
        self.run = Run(folder)
        self.messages = []

    def train(self, *changes, resume=False, stop_after=None, **values):
        """Train to the end, or for `stop_after` steps of this life."""
        recipe = Recipe.from_dict({**RECIPE, **values}).with_changes(*changes)
        if not self.run.path.exists():
            Run.create_at(self.run.path)
            self.run.write_inputs(recipe, Strategy.parse("single"), Cluster.local())

        stop = StopInStep(stop_after)
        context = Context(0, 1, 0, "file:/nowhere", "test", 1, self.messages.append, stop)
        task = Task(recipe.to_dict(), "single", "cpu", str(self.run.path), resume)
        return train_on_rank(context, task)

    @property
    def steps(self):
        """The steps that `metrics.jsonl` has lines of training of."""
        return [line["step"] for line in self.run.metrics() if "evaluation" not in line]

    @property
    def checkpoints(self):
        names = (path.name for path in self.run.checkpoints_path.iterdir())
        return sorted(int(name.removeprefix("step-")) for name in names)

    def weights(self, step):
        from shoal.checkpoint import Checkpoint, checkpoint_path

        checkpoint = Checkpoint.open(checkpoint_path(self.run.checkpoints_path, step))
        return {name: checkpoint.read(name) for name in checkpoint.names}

    def add_line(self, name, value):
        with (self.run.path / name).open("a") as file:
            file.write(json.dumps(value) + "\n")


@pytest.fixture
def small(tmp_path):
    return Small(tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 12 steps that nobody has disturbed, and its summary."""
    done = Small(tmp_path_factory.mktemp("undisturbed") / "run")
    return done, done.train()
