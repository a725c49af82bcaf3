"""One rank's part of a run: meet, compare, assemble, train, say how it went."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from shoal.checkpoint import Checkpoint, checkpoint_path, discard_after, newest_valid
from shoal.comm import Groups, Transport
from shoal.errors import CheckpointDamaged, RunError, RunFolderError, ShoalError
from shoal.job import Execution, Job, workload_of
from shoal.launch import Context, allocator
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Async, Solo, Strategy
from shoal.train.agree_start import compare, describe_parameters, model_digests
from shoal.train.asynchronous import crew_of, staleness_of
from shoal.train.clock import Stopwatch
from shoal.train.document import versions
from shoal.train.located import located
from shoal.train.loop import Loop, Outcome
from shoal.train.memory import PeakMemory
from shoal.train.team import Team
from shoal.train.telling import split_of, tell


@dataclass(frozen=True)
class Task:
    """What every rank is told: all plain values."""

    recipe: dict[str, Any]
    strategy: str
    device: str
    run: str | None  # the run's folder; None where rank 0 opens it once the ranks have met
    resume: bool
    transport: str = "auto"  # a `comm.Transport`
    replay: str | None = None  # a ledger whose order is followed


def train_on_rank(
    context: Context,
    task: Task,
    open_folder: Callable[[], Path] | None = None,
    opened: Callable[[Run], None] = lambda _run: None,
) -> dict[str, Any]:
    """Train; returns this rank's part of the run's summary. Collective over the context's ranks.

    ``open_folder``: how rank 0 opens the run's folder, where the task does not name it; ``opened``
    is told of it on every rank.
    """
    watch = Stopwatch()
    recipe, strategy = Recipe.from_dict(task.recipe), Strategy.parse(task.strategy)
    torch.set_num_threads(context.threads)
    if strategy.saves_memory:
        allocator.give_back()
    device = device_of(task.device, context.local_rank)
    way = strategy.agreement
    groups = Groups.form(
        context.rank,
        context.world_size,
        context.store,
        context.generation,
        device,
        axes=strategy.axes,
        shards=strategy.shards,
        apart=way.apart or isinstance(way, Async),
        mail=isinstance(way, Async),
        savers=(way.servers or None) if isinstance(way, Async) else None,
        transport=cast(Transport, task.transport),
    )
    if groups.world.rank == 0 and groups.reason is not None:
        message = f"gloo between ranks, as they cannot share memory: {groups.reason}"
        context.send({"kind": "event", "event": "choice", "message": message})
    with located(context.rank):
        compare(groups.world, _program(recipe, strategy, device))
        folder = _shared_folder(groups, open_folder) if task.run is None else Path(task.run)
        run = Run.open(folder)
        opened(run)
        summary, alone = _train(context, task, groups, run, watch)
    # Not after an error, or where ranks are missing: they never answer.
    if not alone:
        groups.close()
    return summary


def _shared_folder(groups: Groups, open_folder: Callable[[], Path] | None) -> Path:
    """Rank 0 opens the run's folder; all get its path, or its error."""
    said: dict[str, Any] = {}
    if groups.world.rank == 0 and open_folder is not None:
        try:
            said["path"] = str(open_folder().resolve())
        except ShoalError as error:
            said["error"] = error.located(rank=0).to_json()
    said = groups.world.all_gather_json(said)[0]
    if "error" in said:
        raise ShoalError.from_json(said["error"])
    return Path(said["path"])


def _train(
    context: Context, task: Task, groups: Groups, run: Run, watch: Stopwatch
) -> tuple[dict[str, Any], bool]:
    """This rank's part of the summary; and whether ranks are missing at the end."""
    recipe, strategy = Recipe.from_dict(task.recipe), Strategy.parse(task.strategy)
    memory = PeakMemory(groups.device)
    state = _find_state(groups, run, context.send) if task.resume else None
    start: dict[str, Any] = {}
    execution = Execution.of(strategy)
    solo = isinstance(strategy.agreement, Solo)
    work = workload_of(recipe, keeps_a_tenth=solo)

    def look(_number: int, model: torch.nn.Module) -> None:
        start.update(_weights(model))

    unlike = recipe.members is not None
    team = Team.of(
        groups,
        work,
        execution,
        state,
        look,
        (lambda number: workload_of(recipe.member(number))) if unlike else None,
    )
    job = team.job
    # What they had before any of it was cut: the pieces that they keep differ.
    if team.is_apart and (state is not None or "init=own" in str(strategy)):
        start.pop("weights before the first step", None)
    compare(groups.world, _initial(job) if unlike else start | _initial(job))
    if groups.world.rank == 0:
        for message in job.warnings:
            run.log_event("warning", message)
            context.send({"kind": "event", "event": "warning", "message": message})
        tell(split_of(job), run, context.send)
    way = strategy.agreement
    crew = crew_of(job, way, recipe, run, task.replay, context.send, spares=context.spares)
    team = replace(team, crew=crew)
    loop = Loop(team, recipe, run, str(strategy), context.send, watch)
    if state is not None:
        loop.resume(state.manifest.train)
    if groups.world.rank == 0:
        if task.resume:
            # From the very beginning where there is no checkpoint yet.
            discard_after(run.checkpoints_path, job.next_step)
            run.cut_after(job.next_step)
        context.send(_start_message(job, recipe, strategy, resumed=state is not None))
    outcome = loop.run_to_end(context.stop_requested.is_set)
    if not outcome.alone:
        team.close()
    summary = _summary(job, loop, outcome, memory, state)
    return summary | staleness_of(run, way, crew), outcome.alone


def device_of(kind: str, local_rank: int) -> torch.device:
    if kind != "cuda":
        return torch.device("cpu")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= found:
        raise RunError(
            f"local rank {local_rank} needs CUDA device {local_rank}, and torch sees {found}",
            hint="Check CUDA_VISIBLE_DEVICES and the driver (`nvidia-smi`), or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES= to run on the CPU.",
            phase="start-up",
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _program(recipe: Recipe, strategy: Strategy, device: torch.device) -> dict[str, Any]:
    """What the ranks compare before they build anything."""
    items: dict[str, Any] = {f"version of {name}": each for name, each in versions().items()}
    items["strategy"] = str(strategy)
    items["kind of device"] = device.type
    return items | {f"recipe: {key}": each for key, each in recipe.fingerprint_items().items()}


def _weights(model: torch.nn.Module) -> dict[str, Any]:
    """What they compare of the whole model, before step 1."""
    return {
        "parameter names, shapes and types": describe_parameters(model),
        # Gradients are summed by position: the same parameters in another order would be mixed up.
        "order of parameters": {
            f"parameter {place}": name for place, (name, _) in enumerate(model.named_parameters())
        },
        "weights before the first step": model_digests(model),
    }


def _initial(job: Job) -> dict[str, Any]:
    """What else they compare."""
    evaluation = job.workload.evaluation
    return {
        "data": job.workload.feed.fingerprint,
        "evaluation data": evaluation.fingerprint if evaluation is not None else None,
        "first step": job.next_step,
        "boundaries of the stages": list(getattr(job.replica, "boundaries", ())),
        "what is cut": {f"line {place}": line for place, line in enumerate(split_of(job), 1)},
    }


def _find_state(
    groups: Groups, run: Run, send: Callable[[dict[str, Any]], None]
) -> Checkpoint | None:
    """The newest checkpoint that verifies: rank 0 looks, all take its word."""
    found: dict[str, Any] = {"step": None, "error": None}
    if groups.world.rank == 0:

        def named(error: CheckpointDamaged) -> None:
            message = f"{error.message}; the one before it is used"
            run.log_event("warning", message)
            send({"kind": "event", "event": "warning", "message": message})

        try:
            newest = newest_valid(run.checkpoints_path, named)
            found["step"] = newest.step if newest is not None else None
        except CheckpointDamaged as error:
            found["error"] = error.to_json()
    found = groups.world.all_gather_json(found, "start-up")[0]
    if found["error"] is not None:
        raise CheckpointDamaged.from_json(found["error"])
    if found["step"] is None:
        return None
    path = checkpoint_path(run.checkpoints_path, found["step"])
    if not path.exists():
        raise RunFolderError(
            f"{path} is not there on rank {groups.world.rank}",
            hint="Ranks on other hosts need the run folder on a disk that all hosts share.",
        )
    return Checkpoint.open(path)


def _start_message(
    job: Job, recipe: Recipe, strategy: Strategy, *, resumed: bool
) -> dict[str, Any]:
    feed = job.workload.feed
    return {
        "kind": "start",
        "name": recipe.name,
        "strategy": str(strategy),
        "world_size": job.groups.world.size,
        "total_steps": job.workload.total_steps,
        "steps_per_epoch": feed.steps_per_epoch,
        "batch_size": recipe.batch_size,
        "first_step": job.next_step,
        "resumed_from_step": job.next_step if resumed else None,
        "parameters": job.replica.parameters,
        "device": str(job.groups.device),
        "split": list(split_of(job)),
    }


def _summary(
    job: Job, loop: Loop, outcome: Outcome, memory: PeakMemory, state: Checkpoint | None
) -> dict[str, Any]:
    """The run's summary, on every rank alike (its own peak and bytes gathered from all).

    Where ranks are missing it is each rank's own.
    """
    own: dict[str, Any] = {"peak": memory.bytes(), "bytes": job.groups.world.counter.as_dict()}
    everywhere = [own] if outcome.alone else job.groups.world.all_gather_json(own, "metric")
    trained = job.workload.samples_before(outcome.steps)
    first = job.workload.samples_before(job.next_step)
    seconds = loop.watch.seconds
    split = loop.times.timings(seconds.get("step", 0.0))
    saved = loop.committer.last
    checkpoint = saved.path if saved is not None else state.path if state is not None else None
    return {
        "state": outcome.state,
        "reason": outcome.reason,
        "steps": outcome.steps,
        "samples": trained,
        "seconds": round(loop.elapsed, 4),
        "samples_per_second": round((trained - first) / max(seconds.get("step", 0.0), 1e-9), 2),
        "metrics": loop.metrics,
        **({"members": loop.members} if loop.members else {}),
        "best": loop.convergence.state(),
        "bad_examples": loop.bad_examples.count,
        "peak_memory_bytes": [each["peak"] for each in everywhere],
        "split": list(split_of(job)),
        "comm": job.groups.transport,
        "comm_bytes": _by_rank([each["bytes"] for each in everywhere]),
        "timings": {name: round(value, 4) for name, value in (seconds | split).items()},
        "versions": versions(),
        "checkpoint": str(checkpoint) if checkpoint is not None else None,
        "resumed_from_step": state.step if state is not None else None,
    }


def _by_rank(counts: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, list[int]]]:
    """``{collective: {purpose: [bytes of each rank]}}``."""
    result: dict[str, dict[str, list[int]]] = {}
    for rank, count in enumerate(counts):
        for collective, purposes in count.items():
            for purpose, value in purposes.items():
                row = result.setdefault(collective, {}).setdefault(purpose, [0] * len(counts))
                row[rank] = value
    return result
