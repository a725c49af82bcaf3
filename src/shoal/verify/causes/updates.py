"""Updates that differ though gradients agree: the optimizer's step is done again in other ways.

weights before ─ gradients ─▶ step with twice the weight decay, another rate, … ─▶ the ranks'?
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from shoal.verify.evidence import Evidence, Seen, Tensors
from shoal.verify.record import silence_noise, state_after

Edit = Callable[[torch.optim.Optimizer], None]


def of_updates(evidence: Evidence) -> str | None:
    """The first hypothesis about the optimizer's step that fits, in words."""
    for text, edit, times in _edits(evidence):
        done = _again(evidence, edit, times)
        if done is not None and evidence.fits("parameter", done["parameter"]):
            return text
    return _order(evidence)


def of_norms(evidence: Evidence) -> str | None:
    """A norm that is not the whole model's, or that is not what was clipped by."""
    wrong = [seen for seen in evidence.ranks if evidence.wrong(seen, "gradient_norm")]
    if not wrong:
        return None
    for seen in wrong:
        mine = float(next(iter(seen.record.tensors["gradient_norm"].values())))
        own = _norm(list(seen.record.tensors["gradient"].values()))
        if abs(mine - own) <= 1e-6 * max(own, 1e-30):
            return (
                f"clipping by the local norm: rank {seen.rank} has the norm of its own part of the "
                "gradient, where that of the whole model is asked for"
            )
    return (
        "the gradient's norm is not the whole model's: parts are left out of it, or count on "
        "several ranks"
    )


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt())


def _edits(evidence: Evidence) -> Iterator[tuple[str, Edit, int]]:
    def option(name: str, change: Callable[[Any], Any]) -> Edit:
        def edit(optimizer: torch.optim.Optimizer) -> None:
            for group in optimizer.param_groups:
                if name in group:
                    group[name] = change(group[name])

        return edit

    most = max((g.get("weight_decay", 0) for g in evidence.reference.optimizer.param_groups),
               default=0)  # fmt: skip
    yield "weight decay is applied twice", option("weight_decay", lambda d: d * 2), 1
    yield "weight decay is left out", option("weight_decay", lambda d: 0.0), 1
    yield (
        "weight decay is applied to parameters that are not to decay",
        option("weight_decay", lambda d: most),
        1,
    )
    for number in sorted({*evidence.degrees.values(), evidence.microbatches, 2} - {1}):
        for factor in (float(number), 1 / number):
            yield (
                f"the learning rate is {factor:g} times the recipe's",
                option("lr", _times(factor)),
                1,
            )
    yield "the update is done twice", lambda _optimizer: None, 2
    yield "the optimizer's step count is one too many", _count(1), 1
    yield "the optimizer's state is lost: this step began without it", _forget, 1


def _times(factor: float) -> Callable[[Any], Any]:
    return lambda number: number * factor


def _count(more: int) -> Edit:
    def edit(optimizer: torch.optim.Optimizer) -> None:
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"] + more

    return edit


def _forget(optimizer: torch.optim.Optimizer) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step":
                state[key] = torch.zeros_like(value)


def _again(evidence: Evidence, edit: Edit, times: int) -> dict[str, Tensors] | None:
    """What the step leaves if it is done in another way; one device's state is put back."""
    reference = evidence.reference
    model, optimizer = reference.model, reference.optimizer
    after = {key: value.clone() for key, value in model.state_dict().items()}
    state_now = copy.deepcopy(optimizer.state_dict())
    gradients = evidence.theirs.tensors["clipped"] or evidence.theirs.tensors["gradient"]
    try:
        model.load_state_dict(reference.before)
        optimizer.load_state_dict(copy.deepcopy(reference.optimizer_before))
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None
        silence_noise(model, evidence.theirs.tensors["gradient"])
        edit(optimizer)
        for _ in range(times):
            optimizer.step()
        return state_after(model, optimizer)
    except (RuntimeError, ValueError, TypeError, LookupError):
        return None
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.load_state_dict(after)
        optimizer.load_state_dict(state_now)


def _order(evidence: Evidence) -> str | None:
    """Pieces in the wrong order, or from before the step."""
    kind, name = evidence.first.kind, evidence.first.name
    right = evidence.theirs.tensors[kind].get(name)
    for seen in evidence.ranks:
        if name not in seen.record.tensors[kind] or name not in evidence.wrong(seen, kind):
            continue
        mine = seen.record.tensors[kind][name]
        theirs = seen.held.of(kind, {name: right}).get(name) if right is not None else None
        if theirs is None or mine.shape != theirs.shape or not mine.numel():
            continue
        if kind == "parameter" and _is_from_before(evidence, seen, name, mine, theirs):
            return (
                f"part of {name} on rank {seen.rank} is stale: it is from before the step, not "
                "updated or not gathered"
            )
        if _same_values(mine, theirs) or _is_another_part(mine, right):
            return (
                f"pieces of {kind} {name} on rank {seen.rank} are in the wrong order, or another "
                "rank's"
            )
    return None


def _is_from_before(
    evidence: Evidence, seen: Seen, name: str, mine: Tensor, theirs: Tensor
) -> bool:
    before = evidence.reference.before.get(name)
    if before is None:
        return False
    old = seen.held.of("parameter", {name: before})[name]
    scale = 1e-6 * float(theirs.abs().max() or 1.0)
    stale, right = (mine - old).abs() <= scale * 1e-3, (mine - theirs).abs() <= scale
    return bool((stale | right).all()) and not bool(right.all())


def _same_values(a: Tensor, b: Tensor) -> bool:
    first, second = a.flatten().sort().values, b.flatten().sort().values
    return bool(torch.allclose(first, second, rtol=1e-6, atol=1e-9)) and a.numel() > 1


def _is_another_part(mine: Tensor, whole: Tensor | None) -> bool:
    if whole is None or mine.dim() == 0 or mine.shape == whole.shape:
        return False
    rows = mine.shape[0]
    return any(
        mine.shape == whole[start : start + rows].shape
        and torch.allclose(whole[start : start + rows], mine, rtol=1e-6, atol=1e-9)
        for start in range(whole.shape[0] - rows + 1)
    )
