"""A few steps of the run in other numerics, before it begins: what `auto` decides by.

ranks   assemble ─ 2 steps to warm up ─ 6 steps ─┐ once for each candidate, from the same
front   choose ◀── seconds a step, losses ───────┘ weights, on the same batches
"""

import statistics
import threading
import time
from typing import Any

import torch

from shoal.comm import Groups
from shoal.errors import NotFinite, PeerLost, RanksDiffer, ShoalError
from shoal.job import Execution, assemble, workload_of
from shoal.job.numerics import TRIED_STEPS, WARM_UP_STEPS, Tried, candidates, steps_needed
from shoal.job.workload import Workload
from shoal.launch import Context
from shoal.recipe import Recipe
from shoal.strategy import Strategy
from shoal.train.memory import give_back
from shoal.train.rank import device_of
from shoal.train.step import Flags, train_step

GIVEN_UP = 1.5  # times the plain one's seconds a step


def try_on_rank(context: Context, task: dict[str, Any]) -> dict[str, Any]:
    """``{"tried": […], "reason": why nothing was tried, "complete": whether all were}``.

    Collective over the context's ranks.
    """
    recipe, strategy = Recipe.from_dict(task["recipe"]), Strategy.parse(task["strategy"])
    torch.set_num_threads(context.threads)
    workload = workload_of(recipe)
    batch = workload.feed.read(0, 0, 1)
    images = isinstance(batch.inputs, torch.Tensor) and batch.inputs.dim() == 4
    chosen = candidates(strategy, images=images)
    reason: str | None = None
    if workload.total_steps < steps_needed(len(chosen)):
        reason = (
            f"precision float32: {workload.total_steps} steps are too few to try other numerics "
            f"first (from {steps_needed(len(chosen))} on)"
        )
        return {"tried": [], "reason": reason, "complete": False}
    device = device_of(task["device"], context.local_rank)
    groups = Groups.form(
        context.rank,
        context.world_size,
        context.store,
        context.generation,
        device,
        transport=task.get("transport", "auto"),
    )
    tried: list[Tried] = []
    for each in chosen:
        plain_s = tried[0].step_s if tried else None
        one = _try(groups, workload, each, context.stop_requested, plain_s)
        if one is None:
            break
        tried.append(one)
        if tried[0].failed is not None:  # and so will the run, which says it best
            reason = f"precision float32: no other was tried, as {tried[0].failed}"
            break
    groups.close()
    give_back()
    complete = len(tried) == len(chosen)
    return {"tried": [each.to_json() for each in tried], "reason": reason, "complete": complete}


def _try(
    groups: Groups,
    workload: Workload,
    strategy: Strategy,
    stop_requested: threading.Event,
    plain_s: float | None,
) -> Tried | None:
    """Train a few steps; given up early where they take much longer than the plain ones.

    None where a rank was asked to stop: all hear of it in the same step. What goes wrong in plain
    numerics (``plain_s`` is None), on one rank perhaps, is no matter of numerics, and is raised.
    """
    seconds: list[float] = []
    losses: list[float] = []
    try:
        job = assemble(groups, workload, Execution.of(strategy))
        before = _now(groups)
        for step in range(WARM_UP_STEPS + TRIED_STEPS):
            result = train_step(job, step, Flags(stop=float(stop_requested.is_set())))
            if result.flags.stop > 0:
                return None
            losses.append(result.loss)
            now = _now(groups)
            seconds.append(now - before)
            before = now
            if plain_s is not None and step >= WARM_UP_STEPS and seconds[-1] > GIVEN_UP * plain_s:
                break
    except (PeerLost, RanksDiffer):  # one rank alone failed: the ranks cannot go on together
        raise
    except NotFinite as error:  # on all ranks alike
        return Tried(str(strategy), float("inf"), failed=error.message)
    except (ShoalError, RuntimeError, NotImplementedError) as error:
        if plain_s is None:
            raise
        # An operation that does not exist in bf16, say: on all ranks alike, as they run the same.
        return Tried(str(strategy), float("inf"), failed=str(error).splitlines()[0])
    timed = seconds[WARM_UP_STEPS:]
    return Tried(str(strategy), statistics.median(timed), tuple(losses))


def _now(groups: Groups) -> float:
    """Rank 0's clock, on all ranks: they decide by it together."""
    if groups.device.type == "cuda":
        torch.cuda.synchronize(groups.device)
    clock = torch.tensor([time.perf_counter()], dtype=torch.float64)
    return float(groups.world.broadcast(clock, 0, "start-up"))
