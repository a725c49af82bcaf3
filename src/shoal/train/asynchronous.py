"""What a run with `async:S` has besides: its meetings planned from the recipe, its ledger.

crew = crew_of(job, strategy.agreement, recipe, run, replay=None, send=context.send)
staleness_of(run, agreement, crew)       # {"bound": 2, "contributions": {"0": 14, "1": 30}, …}
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoal.errors import Refused, RunFolderError
from shoal.job import Job
from shoal.job.owning import workers_of
from shoal.recipe import Recipe
from shoal.run import Run, read_lines
from shoal.strategy import Agreement, Async
from shoal.sync.asynchronous import Ledger
from shoal.sync.ledger import by_contribution, histogram
from shoal.train.crew import Crew, Plan

NAMED = 100  # at most so many events of one kind in a run; all are counted


def crew_of(
    job: Job,
    way: Agreement,
    recipe: Recipe,
    run: Run,
    replay: str | None,
    send: Callable[[dict[str, Any]], None],
    *,
    spares: bool = False,
) -> Crew | None:
    """This rank's part of an asynchronous run; None for other strategies. Collective.

    ``spares``: whether ranks may die that the others go on without (see `Plan`).
    """
    if not isinstance(way, Async) or job.owned is None:
        if replay is not None:
            raise Refused(
                f"{replay} is the ledger of an asynchronous run, and this strategy is {way}",
                hint="Replay with the strategy of its run, as in --strategy dp2/async:2.",
            )
        return None
    past = None
    if replay is not None and not Path(replay).is_file():
        raise RunFolderError(
            f"there is no ledger {replay}", hint="Give the staleness.jsonl of a run with async:S."
        )
    if replay is not None:
        each = len(workers_of(job.groups, way))
        past = by_contribution(read_lines(Path(replay)), Path(replay), each, way.staleness)
    ledger = _ledger(run, send) if job.groups.world.rank == 0 else None
    plan = plan_of(recipe, job.workload.feed.steps_per_epoch, past, spares=spares)
    return Crew(job, way, plan, ledger)


def plan_of(
    recipe: Recipe, steps_per_epoch: int, past: Any = None, *, spares: bool = False
) -> Plan:
    """When the model is evaluated and saved: by steps, known beforehand; or by the clock."""
    durations = (recipe.evaluate.every, recipe.checkpoint.every)
    steps = [each.steps(steps_per_epoch) for each in durations]
    known = [each for each in steps if each is not None]
    seconds = [each.value for each in durations if each.unit == "seconds"]

    def boundary_after(step: int) -> int:
        return min(((step // each + 1) * each for each in known), default=1 << 60)

    return Plan(boundary_after, min(seconds, default=None), past, spares)


def _ledger(run: Run, send: Callable[[dict[str, Any]], None]) -> Ledger:
    lines = run.staleness_log()
    told: dict[str, int] = {}

    def tell(event: str, message: str, rank: int, step: int) -> None:
        told[event] = told.get(event, 0) + 1
        if told[event] <= NAMED:
            run.log_event(event, message, rank, step)
            send({"kind": "event", "event": event, "message": message, "rank": rank, "step": step})

    return Ledger(lines.add, tell)


def staleness_of(run: Run, way: Agreement, crew: Crew | None) -> dict[str, Any]:
    """The audit of a run, from its ledger; empty for other strategies."""
    if crew is None or not isinstance(way, Async) or not crew.counts:
        return {}
    lines = run.staleness()
    kept = [int(line["staleness"]) for line in lines if not line.get("refused")]
    return {
        "staleness": {
            "bound": way.staleness,
            "largest": max(kept, default=0),
            "mean": round(sum(kept) / max(1, len(kept)), 4),
            "contributions": histogram(lines),
            "refused": sum(bool(line.get("refused")) for line in lines),
            "taken_back": crew.counts["taken_back"],
        }
    }
