"""Gradients that are some of the right ones, several times the right ones, or rounded.

k · g             a degree of the strategy, or the number of microbatches, once too often
Σ of some g_i     of some replicas' shares, or of some microbatches, only
g of one use      a tied parameter's other use is lost
Σ over ranks = g  partial sums that were not summed
"""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shoal.verify.causes.shares import gradient_of_rows
from shoal.verify.evidence import Evidence, Tensors
from shoal.verify.measure import errors

_AXES = {"dp": "replicas", "tp": "tensor ranks", "pp": "stages"}
MOST_PARTS = 8  # of which every subset is tried


def of_gradients(evidence: Evidence) -> str | None:
    """The first hypothesis about whole gradients that fits, in words."""
    for investigate in (_multiple, _one_use, _some_parts, _partial_sums, _rounded, _behind):
        text = investigate(evidence)
        if text is not None:
            return text
    return None


def wrong_names(evidence: Evidence, kind: str) -> set[str]:
    """What differs from one device on any rank."""
    return {name for seen in evidence.ranks for name in evidence.wrong(seen, kind)}


def _multiple(evidence: Evidence) -> str | None:
    right = evidence.theirs.tensors["gradient"]
    wrong = wrong_names(evidence, "gradient")
    which = "gradients are" if wrong == set(right) else f"the gradient of {_some(wrong)} is"
    for number, what in _numbers(evidence).items():
        for factor, text in (
            (number, f"{number} times what it should be, {what}: summed once too often, or a loss "
             "that was not divided"),
            (1 / number, f"÷ {number}, {what}: averaged where it should be summed, or a loss "
             "divided once more"),
        ):  # fmt: skip
            whole = {n: g * factor if n in wrong else g for n, g in right.items()}
            if evidence.fits("gradient", whole):
                return f"{which} {text}"
    return None


def _numbers(evidence: Evidence) -> dict[int, str]:
    """Numbers that a gradient may be multiplied by, and what they are in the strategy."""
    found: dict[int, list[str]] = {}
    for axis, words in _AXES.items():
        found.setdefault(evidence.degrees.get(axis, 1), []).append(f"the number of {words}")
    found.setdefault(evidence.microbatches, []).append("the number of microbatches")
    found.pop(1, None)
    found.setdefault(2, []).append("twice")
    return {number: " or ".join(words) for number, words in found.items()}


def _one_use(evidence: Evidence) -> str | None:
    """A tied parameter has the gradient of one of its uses alone."""
    model, right = evidence.reference.model, evidence.theirs.tensors["gradient"]
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    for names in uses.values():
        if len(names) < 2 or names[0] not in right:
            continue
        for kept, gradient in _by_use(evidence, names).items():
            if evidence.fits("gradient", right | {names[0]: gradient}):
                lost = " and ".join(name for name in names if name != kept)
                return (
                    f"the gradient of the tied parameter {names[0]} is that of its use as {kept} "
                    f"alone: that of {lost} is dropped"
                )
        wrong = [seen for seen in evidence.ranks if names[0] in evidence.wrong(seen, "gradient")]
        each = _by_use(evidence, names).values()
        if wrong and all(
            any(evidence.fits_rank(s, "gradient", {names[0]: g}, [names[0]]) for g in each)
            for s in wrong
        ):
            return (
                f"the gradients of the tied parameter {names[0]} are not added up: each rank has "
                "that of one use alone"
            )
    return None


def _by_use(evidence: Evidence, names: Sequence[str]) -> Tensors:
    """The gradient of each use of a tied parameter: each gets a parameter of its own."""
    model = evidence.reference.model
    places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
              for name in names}  # fmt: skip
    tied = getattr(*places[names[0]])
    apart = {name: torch.nn.Parameter(tied.detach().clone()) for name in names}
    try:
        for name, (module, leaf) in places.items():
            setattr(module, leaf, apart[name])
        rows = (0, evidence.reference.workload.feed.batch_examples(evidence.step))
        gradient_of_rows(evidence, [rows])
        return {name: _grad(parameter) for name, parameter in apart.items()}
    finally:
        for module, leaf in places.values():
            setattr(module, leaf, tied)


def _grad(parameter: torch.nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def _some_parts(evidence: Evidence) -> str | None:
    """The gradient of some of the shares, or of some of the microbatches."""
    for what, parts in (
        ("replica", [[share] for share in evidence.shares]),
        ("microbatch", _microbatches(evidence)),
    ):
        if not 2 <= len(parts) <= MOST_PARTS:
            continue
        each = [gradient_of_rows(evidence, rows) for rows in parts]
        for chosen in _subsets(len(parts)):
            whole = _sum([each[part] for part in chosen])
            if evidence.fits("gradient", whole):
                numbers = ", ".join(map(str, chosen))
                return (
                    f"gradients are those of {what} {numbers} of {len(parts)} only: a sum over "
                    f"the wrong group, or {_of_others(what)}"
                )
    return None


def _of_others(what: str) -> str:
    if what == "replica":
        return "replicas left out of the all-reduce"
    return "other microbatches' gradients forgotten"


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, count):
        yield from itertools.combinations(range(count), size)


def _microbatches(evidence: Evidence) -> list[list[tuple[int, int]]]:
    """The rows of each microbatch, of all shares."""
    number = evidence.microbatches
    parts: list[list[tuple[int, int]]] = [[] for _ in range(number)]
    for start, stop in evidence.shares:
        each, more = divmod(stop - start, number)
        for part in range(number):
            after = start + each + (part < more)
            parts[part].append((start, after))
            start = after
    return [part for part in parts if any(b > a for a, b in part)]


def _sum(gradients: Sequence[Tensors]) -> Tensors:
    names = dict.fromkeys(name for each in gradients for name in each)
    return {name: torch.stack([g[name] for g in gradients if name in g]).sum(0) for name in names}


def _partial_sums(evidence: Evidence) -> str | None:
    """Each tensor rank has a part of the sum; together they are right."""
    ranks = evidence.degrees.get("tp", 1)
    right = evidence.theirs.tensors["gradient"]
    wrong = [name for name in wrong_names(evidence, "gradient") if name in right]
    if ranks == 1 or not wrong:
        return None
    for name in wrong:
        held = [seen.record.tensors["gradient"].get(name) for seen in evidence.ranks
                if seen.place["dp"] == 0 and name in seen.layout]  # fmt: skip
        parts = [each for each in held if each is not None and each.shape == right[name].shape]
        if len(parts) != ranks:
            continue
        summed = {name: torch.stack(parts).sum(0)}
        if errors(summed, {name: right[name]})[name] <= evidence.limit("gradient", name):
            return (
                f"partial sums: each tensor rank has its own part of the gradient of {name}, and "
                "their sum is right: an all-reduce is missing in the backward pass of cut layers"
            )
    return None


def _rounded(evidence: Evidence) -> str | None:
    """Every value is one that bfloat16, or float16, has."""
    wrong = wrong_names(evidence, "gradient")
    for dtype in (torch.bfloat16, torch.float16):
        tensors = [
            tensor
            for seen in evidence.ranks
            for name, tensor in seen.record.tensors["gradient"].items()
            if name in wrong
        ]
        if tensors and all(torch.equal(t, t.to(dtype).to(t.dtype)) for t in tensors):
            name = str(dtype).removeprefix("torch.")
            return (
                f"gradients were rounded to {name}: reduced in {name} where a wider type was "
                "asked for"
            )
    return None


def _behind(evidence: Evidence) -> str | None:
    """What comes before some place differs, and what comes after it agrees."""
    wrong, names = wrong_names(evidence, "gradient"), list(evidence.theirs.tensors["gradient"])
    places = [place for place, name in enumerate(names) if name in wrong]
    if not places or len(places) == len(names) or len(names) - 1 in places:
        return None
    return (
        f"a gradient is lost on the way back: {_some(wrong)} before {names[places[-1] + 1]} "
        "differ and what comes after them agrees: that of a skip connection, or of a value that "
        "crosses between stages or ranks, is missing there"
    )


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
