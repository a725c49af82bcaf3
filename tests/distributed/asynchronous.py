"""Asynchronous training of a case on the pool's ranks, and the same in one plain loop.

ran = train(pool, 2, case, Async(2))          # weights, ledger, losses, events
plain = simulate(case, ran.ledger, Async(2))  # a loop over the ledger: torch and nothing else
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from onedevice import Case, assembled, cast
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NEVER = 1 << 60


@dataclass(frozen=True)
class How:
    """How a case is trained; ``builds``: models of ranks that have another than the case's."""

    bound: int
    servers: int = 0
    compensate: float = 0.0
    damp: float = 0.0
    copies: int = 0
    past: Any = None  # a ledger to be followed
    boundary_every: int = NEVER
    builds: dict[int, Callable[[], nn.Module]] = field(default_factory=dict)
    impatient: bool = False
    state: str | None = None
    last: int | None = None  # the step to stop before


@dataclass(frozen=True)
class Ran:
    weights: dict[str, Tensor]
    ledger: list[dict[str, Any]]
    losses: list[list[float]]  # of each rank
    events: list[Any]
    counts: dict[str, int]
    errors: list[Any]


def _groups(context: Any) -> Any:
    from shoal.comm import Groups

    torch.set_num_threads(1)
    place = context.rank, context.world_size, context.store, context.generation
    return Groups.form(*place, apart=True, mail=True, timeout_s=60)


def _crew(groups: Any, job: Any, how: How, lines: list[Any], events: list[Any]) -> Any:
    from shoal.strategy import Async
    from shoal.sync.asynchronous import Ledger, coordinator, member
    from shoal.train.crew import Crew, Plan

    coordinator.PATIENCE_S = 0.0 if how.impatient else 10.0
    member.LOOK_ROUND_S = 0.01 if how.impatient else 1.0
    every = how.boundary_every
    past = None
    if how.past is not None:
        past = {(line["step"], line["index"]): line for line in how.past}
    plan = Plan(lambda step: (step // every + 1) * every, past=past)
    way = Async(how.bound, how.servers, how.compensate, how.damp, how.copies)
    return Crew(job, way, plan, Ledger(lines.append, lambda *told: events.append(told)))


def _train(context: Any, case: Case, how: How, folder: str) -> Any:
    from shoal.errors import NotFinite
    from shoal.strategy import Async
    from shoal.train.step import Flags

    groups = _groups(context)
    way = Async(how.bound, how.servers, how.compensate, how.damp, how.copies)
    build = how.builds.get(context.rank, case.build)
    job = assembled(groups, replace(case, build=build, execution={"agreement": way}))
    lines: list[Any] = []
    events: list[Any] = []
    crew = _crew(groups, job, how, lines, events)
    losses: list[float] = []
    try:
        for step in range(len(case.batches)):
            losses.append(crew.step(step, Flags(seconds=float(step))).loss)
            if (step + 1) % how.boundary_every == 0:
                crew.settle()
    except NotFinite as error:
        crew.close()
        groups.close()
        return {"error": [error.rank, error.step]}
    crew.settle()
    held = {
        name: tensor.detach().clone().contiguous()
        for name, tensor in job.replica.holding.state_dict().items()
    }
    computed = {
        name: each.clone().contiguous() for name, each in job.replica.model.state_dict().items()
    }
    save_file(held, Path(folder) / f"held-{context.rank}.safetensors")
    save_file(computed, Path(folder) / f"model-{context.rank}.safetensors")
    counts = crew.counts
    crew.close()
    groups.close()
    return {"ledger": lines, "losses": losses, "events": events, "counts": counts}


def train(pool: Any, ranks: int, case: Case, how: How, folder: Path) -> Ran:
    """Train on the first `ranks` ranks; every rank must end with the same weights."""
    folder.mkdir(exist_ok=True)
    said = pool.call(_train, case, how, str(folder), ranks=ranks)
    if "error" in said[0]:
        return Ran({}, [], [], [], {}, [each["error"] for each in said])
    owned = [load_file(folder / f"held-{rank}.safetensors") for rank in range(ranks)]
    weights = {name: tensor for part in owned for name, tensor in part.items()}
    # Each tensor has one owner, and with copies another, which has the same bits.
    assert sum(map(len, owned)) == len(weights) * (1 + how.copies)
    assert all(torch.equal(each, weights[name]) for part in owned for name, each in part.items())
    for rank in range(ranks):
        model = load_file(folder / f"model-{rank}.safetensors")
        assert model.keys() == weights.keys()
        assert all(torch.equal(model[name], weights[name]) for name in weights)
    json.dumps(said)
    first = said[0]
    losses = [each["losses"] for each in said]
    return Ran(weights, first["ledger"], losses, first["events"], first["counts"], [])


def simulate(case: Case, ledger: list[dict[str, Any]], how: How, each: int) -> dict[str, Tensor]:
    """The weights after the contributions of a ledger: one process, one model, plain torch."""
    torch.manual_seed(case.seed)
    model = case.build().to(case.dtype).train()
    optimizer = case.optimizer(model)
    lines = {(line["step"], line["index"]): line for line in ledger}
    versions = [_values(model)]
    for step, (inputs, targets) in enumerate(case.batches):
        cuts = _cuts(len(targets), each)
        parts, ages = [], []
        for index, (start, stop) in enumerate(cuts):
            if start == stop or lines[step, index].get("refused"):
                continue
            base = versions[lines[step, index]["computed_on"]]
            _set(model, base)
            optimizer.zero_grad()
            total, count = case.objective(
                model(cast(inputs[start:stop], case.dtype)), targets[start:stop]
            )
            (total / count).backward()
            # What no contribution uses has no gradient, and is not decayed either.
            left = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            parts.append((float(count), base, left))
            ages.append(1 + step - lines[step, index]["computed_on"])
        _set(model, versions[step])
        for place, parameter in enumerate(model.parameters()):
            parameter.grad = None
            for count, base, gradients in parts:
                g = gradients[place]
                if g is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                moved = versions[step][place] - base[place]
                g = g + how.compensate * g * g * moved
                parameter.grad += count / sum(part[0] for part in parts) * g
        if case.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm)
        _step(optimizer, [part[0] for part in parts], ages, how.damp)
        versions.append(_values(model))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _step(
    optimizer: torch.optim.Optimizer, counts: list[float], ages: list[int], damp: float
) -> None:
    pairs = zip(counts, ages, strict=True)
    damped = sum(count * age**-damp for count, age in pairs) / sum(counts)
    rates = [group["lr"] for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * damped
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def _set(model: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)


def _cuts(examples: int, each: int) -> list[tuple[int, int]]:
    from shoal.job import shares

    return list(shares(examples, each))
