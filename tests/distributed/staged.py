"""Training in stages on ranks of the pool, beside one device: what `onedevice` is for replicas.

    errors = compare_staged(pool, axes, case, tmp_path, how)     # {"gradient": 1e-15, …}

Every rank notes the tensors that it holds; together they must be all of the model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from onedevice import (
    KINDS,
    Case,
    Rows,
    Trace,
    _error,
    cast,
    gradients,
    named_outputs,
    note,
    note_state,
    of_kind,
    trace_job,
    train_plainly,
)
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves, tree_map

Axes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class How:
    """`Staging`'s fields, and what else is special about a comparison."""

    method: str = "1f1b"
    microbatches: int = 1
    chunks: int | None = None
    recompute: bool = False
    random: bool = False
    sequences: bool = False


def rows_of(case: Case, step: int, start: int, stop: int) -> Rows:
    inputs, targets = tree_map(lambda whole: whole[start:stop], tuple(case.batches[step]))
    return Rows(inputs, targets, torch.arange(start, stop)).to("cpu", case.dtype)


def built(groups: Any, case: Case, how: How) -> Any:
    """The case's model in stages, on this rank."""
    from shoal.parallel import Numerics
    from shoal.parallel.pipeline import Staging, build_staged_replica

    torch.manual_seed(case.seed)
    return build_staged_replica(
        case.build().to(case.dtype).train(),
        case.objective,
        Numerics(case.dtype, **case.execution),
        groups,
        Staging(how.method, how.microbatches, how.chunks, how.sequences),
        rows_of(case, 0, 0, 8).inputs,
        seed=case.seed,
        normalize_over=case.normalize_over,
        recompute=how.recompute,
    )


def train_stages(groups: Any, case: Case, how: How) -> Trace:
    """Train the case as one of the ranks; what this rank has of each step."""
    from shoal.job.sharing import share_of
    from shoal.sync import build_agreement

    replica = built(groups, case, how)
    model = replica.model
    replica.capture()
    agreement = build_agreement(groups)
    agreement.attach(replica)
    # A stage may be without parameters, of which optimizers want one.
    held = model if list(model.parameters()) else torch.nn.ParameterList([torch.zeros(0)])
    optimizer = case.optimizer(held)
    trace: Trace = {}
    for step, (_, targets) in enumerate(case.batches):
        examples = len(tree_leaves(targets)[0])
        share = share_of(examples, groups.data.size, case.normalize_over or 1)
        batch = rows_of(case, step, *share.reads(groups.data.rank))
        loss, count = replica.forward_backward(batch, step, share, agreement.share).tolist()
        agreement.agree(replica)
        replica.rescale(count)
        note(trace, step, "loss", {"loss": torch.tensor(loss / count, dtype=torch.float64)})
        note(trace, step, "gradient", placed(gradients(model), replica.layout))
        if replica.captured is not None:
            note(trace, step, "output", named_outputs(replica.captured))
        if case.clip_norm is not None:
            norm = replica.gradient_norm()
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), case.clip_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        if held is model:
            state: Trace = {}
            note_state(state, step, model, optimizer)
            trace |= placed(state, replica.layout)
    return trace


def placed(tensors: Trace, layout: Any) -> Trace:
    """Pieces of tensors that are cut, in their places in wholes that are NaN everywhere else."""
    found = {}
    for key, tensor in tensors.items():
        parts = [n for n in layout if key == n or key.split("/", 2)[-1].split("/")[0] == n]
        part = layout[parts[0]] if parts else None
        if part is None or part.is_whole or tuple(tensor.shape) != part.shape:
            found[key] = tensor
            continue
        found[key] = torch.full(part.global_shape, float("nan"), dtype=tensor.dtype)
        for box, index in part.places():
            place = tuple(map(slice, box.offset, box.stop))
            found[key][place] = tensor[index]
    return found


def _save_stages(groups: Any, case: Case, how: How, folder: str) -> list[str]:
    trace = train_stages(groups, case, how)
    save_file(trace, Path(folder) / f"rank-{groups.world.rank}.safetensors")
    return sorted({key.split("/", 2)[2] for key in trace if key.split("/")[1] == "parameter"})


def staged(pool: Any, axes: Axes, case: Case, how: How, folder: Path) -> list[Trace]:
    ranks = 1
    for _, degree in axes:
        ranks *= degree
    pool.run(_save_stages, case, how, str(folder), ranks=ranks, axes=axes)
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(ranks)]


def compare_staged(
    pool: Any, axes: Axes, case: Case, folder: Path, how: How | None = None
) -> dict[str, float]:
    """The largest error of each kind; every tensor of one device's must be on some rank.

    One device is plain torch; of a case with random choices, Shoal on one device.
    """
    from shoal.comm import Groups

    how = how or How()
    expected = trace_job(Groups.alone(), case) if how.random else train_plainly(case)
    return errors_of(expected, staged(pool, axes, case, how, folder))


def errors_of(expected: Trace, ranks: Sequence[Trace]) -> dict[str, float]:
    worst = dict.fromkeys(KINDS, 0.0)
    for step in range(1 + max(int(key.split("/")[0]) for key in expected)):
        whole = of_kind(expected, step, "output")
        parts = [part for part in (of_kind(trace, step, "output") for trace in ranks) if part]
        # Tensor ranks have the same outputs.
        rows = sum(len(next(iter(part.values()))) for part in parts)
        parts = parts[:: max(1, rows // len(next(iter(whole.values()))))]
        cut = {name: torch.cat([part[name] for part in parts]) for name in whole}
        worst["output"] = max(worst["output"], _error(whole, cut))
        for kind in KINDS[1:]:
            reference, found = of_kind(expected, step, kind), set()
            for trace in ranks:
                mine = {
                    name: torch.where(tensor.isnan(), reference[name], tensor)
                    for name, tensor in of_kind(trace, step, kind).items()
                }
                found |= mine.keys()
                # The scale of an error is the whole model's: what is not here counts as right.
                worst[kind] = max(worst[kind], _error(reference, reference | mine))
            assert found == reference.keys()
    return worst


__all__ = ["Case", "How", "built", "cast", "compare_staged", "errors_of", "staged", "train_stages"]
