"""`train` as a person or a script calls it: settle, check, start the ranks, remember the run.

    here                 ranks
    resolve, check ──▶   train_on_rank × n
    live view      ◀──   messages of rank 0
    run.json, report ◀── summary of rank 0, or the first failure

With ``WORLD_SIZE`` set (torchrun, Slurm) no ranks are started: this process is one of them.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal import env, report
from shoal.cluster import Cluster
from shoal.errors import RankLost, RunError, ShoalError
from shoal.job import Resolved, check_before_start, resolve
from shoal.launch import Ranks
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train.entry import run_on_rank
from shoal.train.folder import Options, failed, finish, open_run, start

Show = Callable[[dict[str, Any]], None]


def train(
    recipe: Recipe,
    strategy: str | Strategy = "auto",
    cluster: Cluster | None = None,
    out: Path | str | None = None,
    resume: bool = False,
) -> Run:
    """Train `recipe`, split by `strategy`, on `cluster` (default: this machine).

    Returns the run, whose ``summary`` is the contract's document; its ``state`` is "done" or
    "stopped". Raises a `ShoalError` for anything else; what was committed stays in the run's folder.
    """
    run = train_with(recipe, strategy, cluster, Options(Path(out) if out else None, resume))
    if run is None:
        raise RunError("this process is not rank 0: the run is in rank 0's hands")
    return run


def train_with(
    recipe: Recipe, strategy: str | Strategy, cluster: Cluster | None, options: Options
) -> Run | None:
    """:func:`train` with every option of the command line; None on ranks other than 0."""
    cluster = cluster or Cluster.local()
    world = env.torchrun_world()
    world_size = world.world_size if world is not None else None
    resolved = resolve(recipe, strategy, cluster, world_size=world_size)
    check_before_start(recipe)
    if world is not None:
        from shoal.train.joined import train_joined

        return train_joined(world, recipe, resolved, cluster, options)
    run = open_run(recipe, options)
    with run.lock(), report.live.view(sys.stderr, verbose=options.verbose) as view:
        start(run, recipe, resolved, cluster, resume=options.resume)
        for reason in resolved.reasons:
            view.show({"kind": "event", "event": "choice", "message": reason})
        try:
            summary = _supervise(run, recipe, resolved, options, view.show)
        except ShoalError as error:
            failed(run, resolved, error)
            raise
        finish(run, resolved, summary)
        view.show({"kind": "end", **summary})
    return run


def _supervise(
    run: Run, recipe: Recipe, resolved: Resolved, options: Options, show: Show
) -> dict[str, Any]:
    """Run the ranks to the end; the policy on a rank's death is here: end, or start again."""
    restarts, resume = 0, options.resume
    while True:
        try:
            return _run_ranks(run, recipe, resolved, resume, show)
        except RankLost as error:
            if restarts == options.max_restarts:
                raise
            restarts, resume = restarts + 1, True
            message = f"{error.where}: {error.message}; starting again from the newest checkpoint"
            run.log_event("recovery", message, error.rank)
            show({"kind": "event", "event": "recovery", "message": message})


def _run_ranks(
    run: Run, recipe: Recipe, resolved: Resolved, resume: bool, show: Show
) -> dict[str, Any]:
    task = {
        "recipe": recipe.to_dict(),
        "strategy": str(resolved.strategy),
        "device": resolved.device,
        "run": str(run.path.resolve()),
        "resume": resume,
    }
    with Ranks(resolved.strategy.world_size, threads=resolved.threads) as ranks:
        results = ranks.call(
            run_on_rank,
            task,
            on_message=lambda _rank, message: show(message),
            on_signal="pass on",
        )
    summary: dict[str, Any] = results[0]
    return summary
