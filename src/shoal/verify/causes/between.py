"""What only the ranks together tell: gradients that add up, copies that differ."""

import torch

from shoal.verify.evidence import Evidence, Seen, Tensors
from shoal.verify.measure import errors


def between_ranks(evidence: Evidence) -> str | None:
    """Ranks that hold the same part of a tensor and have not the same values in it."""
    kind, name = evidence.first.kind, evidence.first.name
    odd = _odd(evidence)
    if odd is None:
        return None
    if kind == "gradient" and _adds_up(evidence):
        return (
            "gradients were not summed over the replicas: each has only its own share's "
            "(their sum is right)"
        )
    where = f"{kind} {name} on rank {odd.rank}"
    if kind == "parameter" and _stale(evidence, odd):
        return (
            f"replicas differ from one another: {where} is stale: it was not updated in this step"
        )
    return (
        f"replicas differ from one another: {where} is not that of the other ranks "
        "(a stale replica, or a sum over the wrong ranks)"
    )


def of_stale(evidence: Evidence) -> str | None:
    """Copies of a weight of which one was not updated."""
    odd = _odd(evidence)
    if odd is None or evidence.first.kind != "parameter" or not _stale(evidence, odd):
        return None
    return between_ranks(evidence)


def _odd(evidence: Evidence) -> Seen | None:
    """The rank that has another tensor than those that hold the same part of it.

    Of several, the first that differs from one device, as long as another one does not or has
    other values.
    """
    kind, name = evidence.first.kind, evidence.first.name
    key = name.rpartition("/")[0] if kind == "optimizer" else name
    holders = [seen for seen in evidence.ranks if key in seen.layout]
    for seen in holders:
        if name not in evidence.wrong(seen, kind):
            continue
        for other in holders:
            # Within a replica gradients may have to be summed: that has causes of its own.
            apart = kind != "gradient" or other.place["dp"] != seen.place["dp"]
            same = other.layout[key] == seen.layout[key]
            if apart and same and not _equal(seen, other, kind, name):
                return seen
    return None


def _equal(a: Seen, b: Seen, kind: str, name: str) -> bool:
    first, second = a.record.tensors[kind].get(name), b.record.tensors[kind].get(name)
    if first is None or second is None:
        return first is second
    return first.shape == second.shape and torch.equal(first, second)


def _adds_up(evidence: Evidence) -> bool:
    """Whether the replicas' gradients sum to one device's; a rank without one has zero."""
    theirs = evidence.theirs.tensors["gradient"]
    summed: Tensors = {name: torch.zeros_like(tensor) for name, tensor in theirs.items()}
    for seen in evidence.ranks:
        for name, tensor in seen.record.tensors["gradient"].items():
            if name not in summed or summed[name].shape != tensor.shape:
                return False
            summed[name] += tensor
    found = errors(summed, theirs)
    return all(e <= evidence.limit("gradient", name) for name, e in found.items())


def _stale(evidence: Evidence, seen: Seen) -> bool:
    """Whether a rank has its parts of the weights from before the step."""
    before = {
        name: evidence.reference.before[name]
        for name in evidence.theirs.tensors["parameter"]
        if name in evidence.reference.before
    }
    return evidence.fits_rank(seen, "parameter", before, evidence.wrong(seen, "parameter"))
