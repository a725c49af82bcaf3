"""Training as one of the ranks that torchrun or Slurm has started.

There is no supervisor of ours: rank 0 keeps the run folder and shows progress, every rank hears
signals itself, and each rank's own failure is its own to print.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

from shoal import report
from shoal.cluster import Cluster
from shoal.env import World
from shoal.errors import ShoalError
from shoal.job import Resolved
from shoal.launch import joined_context
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.train.folder import Options, failed, finish, open_run, start
from shoal.train.rank import Task, train_on_rank


def train_joined(
    world: World, recipe: Recipe, resolved: Resolved, cluster: Cluster, options: Options
) -> Run | None:
    """Be one rank of the world. Rank 0 returns the run, the others None."""
    with contextlib.ExitStack() as stack:
        show: Any = _silent
        run: Run | None = None
        if world.rank == 0:
            show = stack.enter_context(report.live.view(sys.stderr, verbose=options.verbose)).show

        def open_folder() -> Path:
            """Rank 0's part, once the ranks have met: an error here is an error of all."""
            nonlocal run
            run = open_run(recipe, options)
            stack.enter_context(run.lock())
            start(run, recipe, resolved, cluster, resume=options.resume)
            return run.path

        threads = max(1, cluster.cores // world.local_world_size)
        task = Task(
            recipe=recipe.to_dict(),
            strategy=str(resolved.strategy),
            device=resolved.device,
            run=None,
            resume=options.resume,
        )
        try:
            summary = train_on_rank(joined_context(world, threads, show), task, open_folder)
        except ShoalError as error:
            error.located(rank=world.rank)
            if run is not None:
                failed(run, resolved, error)
            raise
        if run is not None:
            finish(run, resolved, summary)
            show({"kind": "end", **summary})
        return run


def _silent(_message: dict[str, Any]) -> None:
    return
