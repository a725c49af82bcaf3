"""`shoal.train` as a script calls it; what it needs is imported when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.cluster import Cluster
    from shoal.recipe import Recipe
    from shoal.run import Run
    from shoal.strategy import Strategy


def train(
    recipe: Recipe,
    strategy: str | Strategy = "auto",
    cluster: Cluster | None = None,
    out: Path | str | None = None,
    resume: bool = False,
) -> Run:
    """Train `recipe`, split by `strategy`, on `cluster` (default: this machine).

    Returns the run, whose ``summary`` is the contract's document; its ``state`` is "done" or
    "stopped". Raises a `ShoalError` for anything else; what was committed stays in its folder.
    Under torchrun every rank returns the run, and rank 0 writes its summary.
    """
    from shoal.train.folder import Options
    from shoal.train.front import train_with

    options = Options(Path(out) if out else None, resume, tell_end=True)
    ended = train_with(recipe, strategy, cluster, options)
    if ended.exit_status > 128:
        raise SystemExit(ended.exit_status)
    if ended.error is not None:
        raise ended.error
    return ended.run
