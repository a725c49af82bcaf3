"""What a run can have begun before its recipe is read: ranks that import torch, ears for signals.

with begun("dp2") as begin:                   # as the command line says
    recipe = …                                # pydantic, YAML; then numpy, a look at the data
    train_with(recipe, "dp2", None, options, begin)
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from shoal import env
from shoal.errors import ShoalError
from shoal.launch import Ahead, StopSignals, wait

PRELOADED = ("shoal.train.rank",)  # what each rank needs for its first step


@dataclass(frozen=True)
class Begun:
    """Ranks that wait, perhaps none yet, and who hears signals meanwhile."""

    ahead: Ahead
    signals: StopSignals


@contextlib.contextmanager
def begun(strategy: str | None = None) -> Iterator[Begun | None]:
    """Begin a run of `strategy`, if it is known and says how many ranks; the end of the block ends
    ranks that nobody has taken. None under torchrun or Slurm, whose ranks are there.

    Signals wait until there is somebody to answer them.
    """
    if env.torchrun_world_or_none() is not None:
        yield None
        return
    with StopSignals() as signals, signals.answered_by(wait), Ahead(PRELOADED) as ahead:
        if strategy is not None:
            _start(ahead, strategy)
        yield Begun(ahead, signals)


def _start(ahead: Ahead, strategy: str) -> None:
    """Start the ranks that `strategy` asks for: a guess, checked when all else is."""
    from shoal.cluster.limits import available_cores
    from shoal.strategy import Strategy

    # What is wrong with it is said later, in its own place.
    with contextlib.suppress(ShoalError):
        parsed = Strategy.parse(strategy)
        cores, ranks = available_cores(), parsed.world_size
        # More ranks than cores are a mistake or run on GPUs: they can wait for the checks.
        if not parsed.is_auto and ranks <= cores:
            ahead.start(ranks, max(1, cores // ranks))
