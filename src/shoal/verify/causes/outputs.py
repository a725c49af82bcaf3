"""Forward passes that differ: other masks, other rows, biases added twice, parts not summed."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from shoal.verify.evidence import Evidence, Seen, Tensors
from shoal.verify.record import outputs_by_name, rows_of

Change = Callable[[str, Tensor], Tensor]


def of_outputs(evidence: Evidence) -> str | None:
    """The first hypothesis about outputs that fits, in words."""
    for investigate in (_rows, _masks, _biases, _parts, _vocabulary, _not_gathered):
        text = investigate(evidence)
        if text is not None:
            return text
    return None


def _rows(evidence: Evidence) -> str | None:
    """A rank's rows are right, and in another order or another replica's."""
    for seen in evidence.ranks:
        for name, mine in seen.record.tensors["output"].items():
            whole = evidence.theirs.tensors["output"].get(name)
            found = None if whole is None else _places(evidence, seen, mine, whole)
            if found is None:
                continue
            start, stop = seen.held.share
            if sorted(found) == list(range(start, stop)):
                return (
                    f"rank {seen.rank} has its rows in another order: microbatches swapped, or "
                    "put together in the wrong order"
                )
            return (
                f"rank {seen.rank} has rows {found[0]} to {found[-1]} of the global batch in place "
                f"of {start} to {stop - 1}: rows read twice, or those of another replica"
            )
    return None


def _places(evidence: Evidence, seen: Seen, mine: Tensor, whole: Tensor) -> list[int] | None:
    """Which example each row is, if each is one and they are not those of the rank in order."""
    examples = seen.held.batch_examples
    start, stop = seen.held.share
    if not examples or whole.dim() == 0 or whole.shape[0] % examples or stop == start:
        return None
    each = whole.shape[0] // examples
    if mine.shape != whole[start * each : stop * each].shape or not whole.is_floating_point():
        return None
    rows = whole.reshape(examples, -1)
    limit = 1e-6 * float(rows.abs().max() or 1.0)
    found = []
    for row in mine.reshape(stop - start, -1):
        distance = (rows - row).abs().amax(1)
        if float(distance.min()) > limit:
            return None
        found.append(int(distance.argmin()))
    return None if found == list(range(start, stop)) else found


def _masks(evidence: Evidence) -> str | None:
    reference, step = evidence.reference, evidence.step
    batch = reference.batch(step)
    rows = batch.rows
    repeated = [rows[: stop - start] for start, stop in evidence.shares]
    for text, masks, of_step in (
        ("dropout masks are repeated on the ranks: each uses those of rank 0's rows", repeated, 0),
        ("dropout masks are those of another step", None, 1),
        ("dropout masks are those of another step", None, -1),
    ):
        parts = []
        for place, (start, stop) in enumerate(evidence.shares):
            given = rows[start:stop] if masks is None else masks[place]
            inputs = _cut(batch.inputs, (start, stop), len(rows))
            parts.append(_forward(evidence, inputs, rows[start:stop], given, step + of_step))
        if any(part is None for part in parts):
            return None
        whole = {name: torch.cat([part[name] for part in parts if part is not None])
                 for name in parts[0] or {} if (parts[0] or {})[name].dim()}  # fmt: skip
        if whole and _explains(evidence, whole):
            return text
    return None


def _explains(evidence: Evidence, whole: Tensors) -> bool:
    """Whether every rank whose outputs differ has these."""
    wrong = [seen for seen in evidence.ranks if evidence.wrong(seen, "output")]
    return bool(wrong) and all(evidence.fits_rank(seen, "output", whole) for seen in wrong)


def _not_gathered(evidence: Evidence) -> str | None:
    """Rows that other ranks have updated are still those of the step before."""
    before, earlier = evidence.reference.before, evidence.reference.earlier
    wrong = [seen for seen in evidence.ranks if evidence.wrong(seen, "output")]
    if not earlier or not wrong:
        return None
    for seen in wrong:

        def mixed(name: str, value: Tensor, seen: Seen = seen) -> Tensor:
            part = seen.layout.get(name)
            if part is None or part.is_whole or part.global_shape != tuple(value.shape):
                return value
            kept: Tensor = earlier[name].clone()
            for box, _ in part.places():
                index = tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))
                kept[index] = before[name][index]
            return kept

        outputs = _with(evidence, mixed)
        if outputs is None or not evidence.fits_rank(seen, "output", outputs):
            return None
    return (
        "weights are stale: rows that other ranks have updated are still those of the step before, "
        "they were not gathered"
    )


def _biases(evidence: Evidence) -> str | None:
    """Biases of layers that are cut along what they sum over, added on every tensor rank."""
    ranks = evidence.degrees.get("tp", 1)
    cut = _cut_names(evidence, dim=1)
    if ranks == 1 or not cut:
        return None
    biases = {f"{name.rpartition('.')[0]}.bias" for name in cut}
    outputs = _with(evidence, lambda name, value: value * ranks if name in biases else value)
    if outputs is not None and evidence.fits("output", outputs):
        return "the bias of layers that are cut along what they sum over is added on every rank"
    return None


def _parts(evidence: Evidence) -> str | None:
    """Each tensor rank goes on with its own part of a sum."""
    if evidence.degrees.get("tp", 1) == 1:
        return None
    fits = []
    for seen in evidence.ranks:
        if not seen.record.tensors["output"]:
            continue
        outputs = _with(evidence, _only_parts(seen))
        fits.append(outputs is not None and evidence.fits_rank(seen, "output", outputs))
    if fits and all(fits):
        return (
            "partial sums: each tensor rank goes on with its own part of what cut layers sum, an "
            "all-reduce is missing in their forward pass"
        )
    return None


def _only_parts(seen: Seen) -> Change:
    """Zero what the rank does not hold."""

    def change(name: str, value: Tensor) -> Tensor:
        part = seen.layout.get(name)
        if part is None or part.is_whole or part.global_shape != tuple(value.shape):
            return value
        kept = torch.zeros_like(value)
        for box, _ in part.places():
            index = tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))
            kept[index] = value[index]
        return kept

    return change


def _vocabulary(evidence: Evidence) -> str | None:
    """Ranks after the first look up the word before, or after, the one that is asked for."""
    names = _cut_names(evidence, dim=0)
    embeddings = {
        f"{path}.weight" if path else "weight"
        for path, module in evidence.reference.model.named_modules()
        if isinstance(module, torch.nn.Embedding)
    }
    for name in sorted(names & embeddings):
        starts = sorted({seen.layout[name].boxes[0].offset[0] for seen in evidence.ranks
                         if name in seen.layout} - {0})  # fmt: skip
        for shift in (1, -1):
            outputs = _with(evidence, _shifted(name, starts, shift))
            if outputs is not None and evidence.fits("output", outputs):
                return f"the vocabulary of {name} is off by one on the ranks after the first"
    return None


def _shifted(name: str, starts: list[int], shift: int) -> Change:
    def change(given: str, value: Tensor) -> Tensor:
        if given != name:
            return value
        moved = value.clone()
        for start, stop in zip(starts, [*starts[1:], len(value)], strict=True):
            rows = value[start:stop]
            moved[start:stop] = torch.roll(rows, shift, 0)
            moved[start if shift > 0 else stop - 1] = 0.0
        return moved

    return change


def _cut_names(evidence: Evidence, dim: int) -> set[str]:
    """Parameters that tensor ranks hold parts of along `dim`."""
    found = set()
    for seen in evidence.ranks:
        for name, part in seen.layout.items():
            if len(part.global_shape) > dim and part.shape[dim] < part.global_shape[dim]:
                found.add(name)
    return found


def _with(evidence: Evidence, change: Change) -> Tensors | None:
    """One device's outputs with other weights; None where the model does not bear it."""
    reference = evidence.reference
    after = {key: value.clone() for key, value in reference.model.state_dict().items()}
    changed = {key: change(key, value.clone()) for key, value in reference.before.items()}
    batch = reference.batch(evidence.step)
    try:
        reference.model.load_state_dict(changed)
        return _forward(evidence, batch.inputs, batch.rows, batch.rows, evidence.step, False)
    finally:
        reference.model.load_state_dict(after)


def _forward(
    evidence: Evidence, inputs: object, rows: Tensor, masks: Tensor, step: int, before: bool = True
) -> Tensors | None:
    """Outputs of one device for some rows, by the weights from before the step."""
    reference = evidence.reference
    after = {key: value.clone() for key, value in reference.model.state_dict().items()}
    if before:
        reference.model.load_state_dict(reference.before)
    try:
        reference.begin(evidence.step, rows, masks, of_step=step)
        with torch.no_grad():
            return outputs_by_name(reference.forward(inputs))
    except (RuntimeError, ValueError, TypeError, LookupError):
        return None
    finally:
        reference.model.load_state_dict(after)


def _cut(inputs: object, share: tuple[int, int], examples: int) -> object:
    def some(leaf: object) -> object:
        return rows_of(leaf, share, examples) if isinstance(leaf, Tensor) else leaf

    return tree_map(some, inputs)
