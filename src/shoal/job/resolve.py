"""What is to run, decided and checked before any rank starts. No torch is imported here.

resolved = resolve(recipe, "auto", Cluster.local())
resolved.strategy      # dp2
resolved.reasons       # ("dp2: 2 cores, one single-thread rank each", …)
"""

import dataclasses
import importlib.util
import runpy
from dataclasses import dataclass
from pathlib import Path

from shoal.cluster import Cluster, computes_in_bf16
from shoal.env import World
from shoal.errors import Refused, WorldError
from shoal.recipe import Recipe
from shoal.strategy import Solo, Strategy

MIN_SHARE = 16  # examples a rank should have of each step, for `auto` to add it
MAX_AUTO_RANKS = 8
# More than these only stop the machine: each rank takes some 200 MB before it has a model.
MAX_RANKS, MAX_RANKS_PER_CORE = 32, 4


@dataclass(frozen=True)
class Resolved:
    """A strategy with nothing left to choose, where it runs, and why it was chosen."""

    strategy: Strategy
    device: str  # "cpu" or "cuda"
    threads: int  # per rank
    reasons: tuple[str, ...]
    tries: bool = False  # whether other numerics are to be tried before the run begins
    free: bool = False  # whether the numerics are `auto`'s to choose, here or in an earlier run

    def settled(self, strategy: Strategy, reason: str) -> "Resolved":
        """With the numerics that were chosen, and why."""
        reasons = (*self.reasons, reason)
        return dataclasses.replace(self, strategy=strategy, reasons=reasons, tries=False)


def resolve(
    recipe: Recipe, strategy: str | Strategy, cluster: Cluster, *, world: World | None = None
) -> Resolved:
    """Settle the strategy of a run.

    ``world``: the ranks that torchrun or Slurm has started, if it has. Raises `StrategyError`,
    `Refused` or `WorldError`.
    """
    chosen = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    gpus, reasons = _usable_gpus(cluster)
    is_free = (
        chosen.is_auto and not (chosen.bf16 or chosen.channels_last) and recipe.precision == "auto"
    )
    if chosen.is_auto:
        chosen, reason = _choose(chosen, recipe, cluster.cores, gpus, world)
        reasons.append(reason)
    chosen, reason = _with_precision(chosen, recipe)
    tries = is_free and world is None
    if tries and not gpus and not computes_in_bf16():
        tries, reason = False, "precision float32: this processor has no instructions for bf16"
    if not tries:
        reasons.append(reason)
    chosen = _with_members(chosen, recipe)
    chosen.check_runnable(recipe.batch_size)
    if world is not None:
        _require_world(world, chosen)
    else:
        _require_room(chosen, cluster.cores)
    ranks = chosen.world_size if world is None else world.local_world_size
    device = "cuda" if 0 < ranks <= gpus else "cpu"
    if device == "cpu" and gpus:
        reasons.append(f"ranks run on the CPU: there are {ranks} here, and {_gpus(gpus)}")
    if device == "cpu" and chosen.offload:
        reasons.append("offload changes nothing on the CPU: its memory is the host's already")
    return Resolved(chosen, device, max(1, cluster.cores // ranks), tuple(reasons), tries, is_free)


def _with_members(strategy: Strategy, recipe: Recipe) -> Strategy:
    """The strategy, with as many members as the recipe names."""
    if recipe.members is None:
        return strategy
    way, count = strategy.agreement, len(recipe.members)
    if not isinstance(way, Solo) or way.members not in (None, count):
        raise Refused(
            f"the recipe has {count} members of its own, and {strategy} does not train so many "
            "models apart",
            hint=f"Use solo:members={count}, as in dp2/solo:members={count}, or leave `members` "
            "out of the recipe (--set members=null).",
        )
    return dataclasses.replace(strategy, agreement=dataclasses.replace(way, members=count))


def _require_world(world: World, strategy: Strategy) -> None:
    ranks, started = strategy.world_size, world.world_size
    if started != ranks:
        size = "SLURM_NTASKS" if world.launcher == "slurm" else "WORLD_SIZE"
        raise WorldError(
            f"strategy {strategy} needs {ranks} rank{'s' * (ranks > 1)}, "
            f"and {size} says that {started} were started",
            hint=f"Start {ranks}, or choose a strategy of {started} ranks (dp{started}).",
        )


def _require_room(strategy: Strategy, cores: int) -> None:
    ranks, most = strategy.world_size, max(MAX_RANKS, MAX_RANKS_PER_CORE * cores)
    if ranks > most:
        raise Refused(
            f"{strategy} needs {ranks} ranks, and this machine has {cores} "
            f"core{'s' * (cores > 1)}: at most {most} are started on it",
            hint="Use smaller degrees, or start the ranks on several hosts with torchrun or Slurm.",
        )


def _usable_gpus(cluster: Cluster) -> tuple[int, list[str]]:
    """How many GPUs ranks may run on here, and why not on those that there are."""
    found = len(cluster.cuda_devices)
    if not found or _torch_has_cuda():
        return found, []
    reason = f"ranks run on the CPU: there {'is' if found == 1 else 'are'} {_gpus(found)}, and "
    return 0, [reason + "this torch is built without CUDA (install one that is, to use them)"]


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"


def _torch_has_cuda() -> bool:
    """Whether the installed torch is built for CUDA or ROCm; asked of its file, not by import."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        values = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    except OSError:
        return False
    return bool(values.get("cuda") or values.get("hip"))


def _choose(
    auto: Strategy, recipe: Recipe, cores: int, gpus: int, world: World | None
) -> tuple[Strategy, str]:
    """A simple rule until there is a planner: a rank a device, while shares stay worth it."""
    if world is not None:
        ranks, reason = world.world_size, f"{world.world_size} ranks were started"
    elif gpus:
        ranks = max(1, min(gpus, recipe.batch_size))
        reason = f"one rank on each of {_gpus(ranks)}"
    else:
        ranks = min(cores, max(1, recipe.batch_size // MIN_SHARE), MAX_AUTO_RANKS)
        reason = (
            f"{cores} core{'s' * (cores > 1)}, batch {recipe.batch_size}: "
            f"at least {MIN_SHARE} examples a rank and step"
        )
    strategy = dataclasses.replace(
        Strategy.parse(f"dp{ranks}"),
        bf16=auto.bf16,
        compile=auto.compile,
        channels_last=auto.channels_last,
        recompute=auto.recompute,
    )
    return strategy, f"auto chose {strategy}: {reason}"


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
