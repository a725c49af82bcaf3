"""Why a strategy differs: each hypothesis is *computed* on one device and held against the ranks.

With the losses of the shares of a batch, s_r (sums) and c_r (counts) of n_r examples on n ranks,

    right                        Σ s_r ÷ Σ c_r
    averaged, not summed         the same ÷ n
    mean of means                Σ (s_r ÷ c_r) ÷ n
    tokens counted as examples   Σ (n_r ÷ Σ n_r) · s_r ÷ c_r
    own share only               s_0 ÷ Σ c_r
    uneven rows left out         shares cut to the smallest
    local statistics             the shares run one by one through train-mode batch norm

the gradient that a hypothesis gives is compared with what rank 0 had; the one that fits names the
cause.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from shoal.verify.certificate import Difference
from shoal.verify.measure import errors
from shoal.verify.record import Record, gradients_of
from shoal.verify.reference import Reference, call

FITS = 1e-6  # a hypothesis explains a gradient that it gives to this relative error

Pair = tuple[Tensor, Tensor]  # a share's sum of losses and its count
Shares = tuple[tuple[int, int], ...]


def likely_cause(
    reference: Reference, first: Difference, mine: Record, theirs: Record, shares: Shares
) -> str:
    """The cause of the first difference, in words. Runs on rank 0, after the differing step."""
    if first.kind in ("output", "loss", "gradient"):
        for text, gradients in _hypotheses(reference, first.step, shares):
            if _same(mine.tensors["gradient"], gradients) and not _same(
                theirs.tensors["gradient"], gradients
            ):
                return text
    return _by_kind(first, mine, theirs)


def _same(mine: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return max(errors(mine, other).values(), default=0.0) <= FITS


def _hypotheses(
    reference: Reference, step: int, shares: Shares
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each hypothesis and the gradient that it gives, from the state before `step`."""
    batch = reference.batch(step)
    ranks = len(shares)
    sizes = [stop - start for start, stop in shares]

    def whole(rule: Callable[[list[Pair]], Tensor]) -> dict[str, Tensor]:
        return _gradient(reference, step, lambda: rule(_whole(reference, batch, shares)))

    for text, rule in _rules(ranks, sizes):
        yield text, whole(rule)
    least = min(sizes)
    if least < max(sizes):
        kept = (0, least * ranks)
        yield (
            "the rows beyond equal shares were left out: the last partial batch, or what does not "
            "divide by the number of ranks, was dropped",
            _gradient(reference, step, lambda: _right(_one_by_one(reference, batch, (kept,)))),
        )
    if any(isinstance(module, _BatchNorm) for module in reference.model.modules()):
        yield (
            "batch statistics were not synchronised: each replica normalised by its own rows",
            _gradient(reference, step, lambda: _right(_one_by_one(reference, batch, shares))),
        )


def _right(pairs: list[Pair]) -> Tensor:
    total = sum(float(count) for _, count in pairs)
    return torch.stack([loss for loss, _ in pairs]).sum() / (total or 1.0)


def _rules(ranks: int, sizes: list[int]) -> list[tuple[str, Callable[[list[Pair]], Tensor]]]:
    def means(pairs: list[Pair]) -> list[Tensor]:
        return [loss / (float(count) or 1.0) for loss, count in pairs]

    def by_examples(pairs: list[Pair]) -> Tensor:
        shares = [mean * (n / sum(sizes)) for mean, n in zip(means(pairs), sizes, strict=True)]
        return torch.stack(shares).sum()

    def own(pairs: list[Pair]) -> Tensor:
        return pairs[0][0] / (sum(float(count) for _, count in pairs) or 1.0)

    def nearby_mean(pairs: list[Pair]) -> Tensor:
        return means(pairs)[0]

    return [
        (
            "gradients were averaged over the replicas where they should be summed "
            "(or the loss was divided by the number of replicas once more)",
            lambda pairs: _right(pairs) / ranks,
        ),
        (
            "gradients were summed twice, or the loss was not divided by the global count",
            lambda pairs: _right(pairs) * ranks,
        ),
        (
            "mean of means: the shares' means were averaged, though the shares are not equal",
            lambda pairs: torch.stack(means(pairs)).sum() / ranks,
        ),
        (
            "masked tokens were weighted as examples: shares count by their examples instead of "
            "by what the objective counts",
            by_examples,
        ),
        ("gradients were not summed over the replicas: each has only its own share's", own),
        ("gradients were not summed over the replicas: each has its own share's mean", nearby_mean),
    ]


def _gradient(reference: Reference, step: int, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradient of a hypothetical loss, from the state before the step, which is put back."""
    after = {k: v.clone() for k, v in reference.model.state_dict().items()}
    reference.model.load_state_dict(reference.before)
    reference.optimizer.zero_grad(set_to_none=True)
    try:
        reference.begin(step, reference.batch(step))
        value = loss()
        if value.requires_grad:
            value.backward()  # type: ignore[no-untyped-call]
        if reference.workload.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(
                reference.model.parameters(), reference.workload.clip_norm
            )
        return gradients_of(reference.model)
    finally:
        reference.optimizer.zero_grad(set_to_none=True)
        reference.model.load_state_dict(after)


def _whole(reference: Reference, batch: Any, shares: Shares) -> list[Pair]:
    """Each share's losses, from one forward of the whole batch."""
    outputs = call(reference.model, batch.inputs)
    return [
        reference.workload.objective(_rows(outputs, share), _rows(batch.targets, share))
        for share in shares
    ]


def _one_by_one(reference: Reference, batch: Any, shares: Shares) -> list[Pair]:
    """Each share's losses, from a forward of its own."""
    return [
        reference.workload.objective(
            call(reference.model, _rows(batch.inputs, share)), _rows(batch.targets, share)
        )
        for share in shares
        if share[1] > share[0]
    ]


def _rows(tree: Any, share: tuple[int, int]) -> Any:
    start, stop = share

    def cut(leaf: Any) -> Any:
        return leaf[start:stop] if isinstance(leaf, Tensor) and leaf.dim() else leaf

    return tree_map(cut, tree)


def _by_kind(first: Difference, mine: Record, theirs: Record) -> str:
    """What the place of the first difference says, where no hypothesis fits."""
    if mine.count != theirs.count:
        return (
            f"the ranks counted {mine.count:g} where one device counts {theirs.count:g}: part of "
            "the batch was left out, read twice, or masked in another way"
        )
    return {
        "output": "the forward pass differs: other weights, other inputs, other random numbers, "
        "or a layer that looks across the batch",
        "loss": "outputs agree and the loss does not: how the shares' losses are put together",
        "gradient": "the loss agrees and a gradient does not: a sum over the wrong ranks, or a "
        "layer whose backward pass misses the other replicas",
        "buffer": "gradients agree and a buffer does not: running statistics were not updated "
        "from the whole batch, or updated twice",
        "parameter": "gradients agree and weights do not: weight decay, learning rate or the "
        "optimizer's state differ",
        "optimizer": "gradients agree and the optimizer's state does not",
    }[first.kind]
