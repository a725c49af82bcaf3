"""What is to run, decided and checked before any rank starts. No torch is imported here.

    resolved = resolve(recipe, "auto", Cluster.local())
    resolved.strategy      # dp2
    resolved.reasons       # ("dp2: 2 cores, one single-thread rank each", …)
"""

import dataclasses
import importlib.util
from dataclasses import dataclass

from shoal.cluster import Cluster
from shoal.errors import Refused, WorldError
from shoal.recipe import Recipe
from shoal.strategy import Strategy

MIN_SHARE = 16  # examples a rank should have of each step, for `auto` to add it
MAX_AUTO_RANKS = 8


@dataclass(frozen=True)
class Resolved:
    """A strategy with nothing left to choose, where it runs, and why it was chosen."""

    strategy: Strategy
    device: str  # "cpu" or "cuda"
    threads: int  # per rank
    reasons: tuple[str, ...]


def resolve(
    recipe: Recipe, strategy: str | Strategy, cluster: Cluster, *, world_size: int | None = None
) -> Resolved:
    """Settle the strategy of a run.

    ``world_size``: the ranks that torchrun or Slurm has started, if it has. Raises `StrategyError`,
    `Refused` or `WorldError`.
    """
    chosen = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    reasons: list[str] = []
    if chosen.is_auto:
        chosen, reason = _choose(chosen, recipe, cluster, world_size)
        reasons.append(reason)
    chosen, reason = _with_precision(chosen, recipe)
    reasons.append(reason)
    chosen.check_runnable(recipe.batch_size)
    ranks = chosen.world_size
    if world_size is not None and world_size != ranks:
        raise WorldError(
            f"strategy {chosen} needs {ranks} rank{'s' * (ranks > 1)}, "
            f"and WORLD_SIZE says that {world_size} were started",
            hint=f"Start {ranks}, or choose a strategy of {world_size} ranks (dp{world_size}).",
        )
    return Resolved(
        chosen, _device(cluster, ranks), max(1, cluster.cores // ranks), tuple(reasons)
    )


def _device(cluster: Cluster, ranks: int) -> str:
    # The GPU build of torch has to be there too; asking the spec keeps torch unimported.
    enough = 0 < ranks <= len(cluster.cuda_devices)
    return "cuda" if enough and importlib.util.find_spec("torch") is not None else "cpu"


def _choose(
    auto: Strategy, recipe: Recipe, cluster: Cluster, world_size: int | None
) -> tuple[Strategy, str]:
    """A simple rule until there is a planner: a rank a device, while shares stay worth it."""
    if world_size is not None:
        ranks, reason = world_size, f"{world_size} ranks were started"
    elif cluster.cuda_devices:
        ranks = max(1, min(len(cluster.cuda_devices), recipe.batch_size))
        reason = f"one rank on each of {ranks} GPUs"
    else:
        most = max(1, recipe.batch_size // MIN_SHARE)
        ranks = min(cluster.cores, most, MAX_AUTO_RANKS)
        reason = (
            f"{cluster.cores} cores, batch {recipe.batch_size}: "
            f"at least {MIN_SHARE} examples a rank and step"
        )
    strategy = dataclasses.replace(Strategy.parse(f"dp{ranks}"), **_execution(auto))
    return strategy, f"auto chose {strategy}: {reason}"


def _execution(strategy: Strategy) -> dict[str, object]:
    return {
        name: getattr(strategy, name)
        for name in ("bf16", "compile", "channels_last", "recompute")
    }


def _with_precision(strategy: Strategy, recipe: Recipe) -> tuple[Strategy, str]:
    if recipe.precision == "float32" and strategy.bf16:
        raise Refused(
            f"strategy {strategy} asks for bf16, and the recipe says precision: float32",
            hint="Leave +bf16 out, or set precision to auto or bf16.",
        )
    if recipe.precision == "bf16" and not strategy.bf16:
        strategy = dataclasses.replace(strategy, bf16=True)
        return strategy, "precision bf16: the recipe asks for it"
    if strategy.bf16:
        return strategy, "precision bf16: the strategy asks for it"
    return strategy, "precision float32: bf16 only where it is asked for"
