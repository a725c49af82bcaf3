"""How long do ranks of a pipeline wait, beside what its table says, and how even is the cut?

    python benchmarks/bubble.py [--steps 6]

    idle share = 1 − Σ busy ÷ (ranks × (last end − first begin))

Each action of each rank is timed in the replica's own loop; busy is its time without that in which
it stood in a receive. The same table is then simulated with the mean times of each stage in that
step, and the two idle shares are set side by side. Clocks are one: all ranks are on one host.
"""

import argparse
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import model_parallel
from sidebyside import cores, spread, table

STEPS, WARMUP = 6, 2
GOAL = 0.05


@dataclass(frozen=True)
class Case:
    model: str
    strategy: str


CASES = (
    *(Case("gpt", f"pp2/{method}/mb:8") for method in ("gpipe", "1f1b", "zb")),
    Case("resnet", "pp2/1f1b/mb:8"),
    Case("separable", "pp2/1f1b/mb:8"),
    Case("gpt", "pp4/1f1b/mb:8"),
)


def measure(rounds: int, share: float = 1.0) -> str:
    """The section of the results page."""
    steps = max(1, round(rounds * STEPS * share / 3))
    rows = [row_of(case, run_case(case, steps)) for case in CASES]
    about = (
        f"## Idle share of a pipeline's step\n\nMedian of {steps} steps (smallest to largest); "
        f"{cores()} cores, one thread a rank: four ranks take turns on them. Goal: within {GOAL} "
        "of the table simulated with the stages' times of the same step."
    )
    return f"{about}\n\n{table(HEAD, rows)}"


HEAD = ["", "idle, measured", "idle, simulated", "difference", "equal stages", "slowest ÷ mean"]


def row_of(case: Case, found: list[dict[str, float]]) -> list[str]:
    columns = {key: [one[key] for one in found] for key in found[0]}
    apart = [abs(one["measured"] - one["simulated"]) for one in found]
    return [
        f"`{case.strategy}` {case.model}",
        spread(columns["measured"], 3),
        spread(columns["simulated"], 3),
        f"**{spread(apart, 3)}**",
        f"{columns['equal'][0]:.3f}",
        spread(columns["uneven"]),
    ]


def run_case(case: Case, steps: int) -> list[dict[str, float]]:
    """Of each step: the idle share measured, simulated, of equal stages; slowest stage ÷ mean."""
    from shoal.launch import Ranks
    from shoal.strategy import Strategy

    strategy = Strategy.parse(case.strategy)
    with Ranks(strategy.world_size, threads=1) as ranks:
        per_rank = ranks.call(_on_rank, case, steps)
    return [_figures(strategy, list(one)) for one in zip(*per_rank, strict=True)]


def _figures(strategy: Any, of_ranks: list[list[Any]]) -> dict[str, float]:
    """``of_ranks[rank]``: (kind, stage, begin, end, waited) of each of its actions."""
    from shoal.schedule import make

    actions = [action for rank in of_ranks for action in rank]
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for kind, stage, begin, end, waited in actions:
        times[kind, stage].append(end - begin - waited)
    span = max(a[3] for a in actions) - min(a[2] for a in actions)
    busy = sum(sum(each) for each in times.values())
    method = strategy.schedule.method if strategy.schedule else "1f1b"
    plan = make(method, len(of_ranks), strategy.microbatches, None)
    mean = {key: statistics.fmean(each) for key, each in times.items()}
    stages = range(plan.stages)
    forward = [mean["F", s] for s in stages]
    weight = [mean.get(("W", s), 0.0) for s in stages]
    backward = [mean.get(("B", s), 0.0) + mean.get(("I", s), 0.0) + weight[s] for s in stages]
    simulated = plan.simulate(forward, backward, weight if plan.splits_backward else None)
    whole = [a + b for a, b in zip(forward, backward, strict=True)]
    return {
        "measured": 1 - busy / (len(of_ranks) * span),
        "simulated": simulated.bubble,
        "equal": plan.simulate(1, 2).bubble,
        "uneven": max(whole) / statistics.fmean(whole),
    }


# ---- on a rank


def _on_rank(context: Any, case: Case, steps: int) -> list[list[Any]]:
    import torch
    import torch.distributed as dist

    from shoal.comm import Groups
    from shoal.strategy import Strategy

    torch.set_num_threads(1)
    strategy = Strategy.parse(case.strategy)
    groups = Groups.form(
        context.rank, context.world_size, context.store, context.generation, axes=strategy.axes
    )
    job, step = model_parallel.shoals(groups, case.strategy, case.model)
    actions = _watch(job.replica)
    found = []
    for number in range(WARMUP + steps):
        actions.clear()
        dist.barrier(group=groups.world.process_group)
        step(number)
        if number >= WARMUP:
            found.append(list(actions))
    groups.close()
    return found


def _watch(replica: Any) -> list[Any]:
    """Every action of the replica from now on, with its times."""
    actions: list[Any] = []
    waited = 0.0
    do, receive = replica._do, replica._parts.links.receive

    def timed_receive(message: Any) -> Any:
        nonlocal waited
        began = time.perf_counter()
        tensors = receive(message)
        waited += time.perf_counter() - began
        return tensors

    def timed_do(run: Any, action: Any) -> None:
        nonlocal waited
        waited, began = 0.0, time.perf_counter()
        do(run, action)
        actions.append((action.kind, action.stage, began, time.perf_counter(), waited))

    replica._do, replica._parts.links.receive = timed_do, timed_receive
    return actions


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="part of a model and strategy")
    given = parser.parse_args()
    for case in CASES:
        if given.only in f"{case.model} {case.strategy}":
            row = row_of(case, run_case(case, given.steps))
            print(table(HEAD, [row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    # Functions go to the ranks by their module's name.
    import bubble

    bubble.main()
