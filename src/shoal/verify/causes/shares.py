"""How the losses of the shares are put together.

With the losses of the shares of a batch, s_r (sums) and c_r (counts) of n_r examples on n ranks,

    right                        Σ s_r ÷ Σ c_r
    averaged, not summed         the same ÷ n
    mean of means                Σ (s_r ÷ c_r) ÷ n
    tokens counted as examples   Σ (n_r ÷ Σ n_r) · s_r ÷ c_r
    own share only               s_0 ÷ Σ c_r
    uneven rows left out         shares cut to the smallest
    local statistics             the shares run one by one through train-mode batch norm

the gradient that a hypothesis gives is compared with what the ranks had.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from shoal.errors import ShoalError
from shoal.verify.evidence import Evidence
from shoal.verify.record import gradients_of, rows_of
from shoal.verify.reference import Reference

Pair = tuple[Tensor, Tensor]  # a share's sum of losses and its count
Shares = tuple[tuple[int, int], ...]
Rule = Callable[[list[Pair]], Tensor]
Hypothesis = Callable[[], dict[str, Tensor]]


def of_shares(evidence: Evidence) -> str | None:
    """The hypothesis about shares whose gradient the ranks have, in words."""
    for text, hypothesis in _hypotheses(evidence.reference, evidence.step, evidence.shares):
        gradients = _computed(hypothesis)
        if gradients is not None and evidence.fits("gradient", gradients):
            return text
    return None


def _computed(hypothesis: Hypothesis) -> dict[str, Tensor] | None:
    """The gradient that a hypothesis gives; None where the model does not bear it.

    A share run on its own may be too small for batch norm, or of a shape that the user's code
    refuses: such a hypothesis does not fit.
    """
    try:
        return hypothesis()
    except (ShoalError, RuntimeError, ValueError, TypeError, LookupError):
        return None


def _hypotheses(
    reference: Reference, step: int, shares: Shares
) -> Iterator[tuple[str, Hypothesis]]:
    """Each hypothesis, and how to get its gradient, from the state before `step`."""
    batch = reference.batch(step)
    ranks = len(shares)
    sizes = [stop - start for start, stop in shares]

    def of(parts: Shares, rule: Rule, *, together: bool) -> Hypothesis:
        def gradient() -> dict[str, Tensor]:
            run = _together if together else _one_by_one
            return _gradient(reference, lambda: rule(run(reference, step, batch, parts)))

        return gradient

    for text, rule in _rules(ranks, sizes):
        yield text, of(shares, rule, together=True)
    least = min(sizes)
    if least < max(sizes):
        yield (
            "the rows beyond equal shares were left out: the last partial batch, or what does not "
            "divide by the number of ranks, was dropped",
            of(((0, least * ranks),), _right, together=False),
        )
    if any(isinstance(module, _BatchNorm) for module in reference.model.modules()):
        yield (
            "batch statistics were not synchronised: each replica normalised by its own rows",
            of(shares, _right, together=False),
        )


def _right(pairs: list[Pair]) -> Tensor:
    total = sum(float(count) for _, count in pairs)
    return torch.stack([loss for loss, _ in pairs]).sum() / (total or 1.0)


def _rules(ranks: int, sizes: list[int]) -> list[tuple[str, Rule]]:
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


def _gradient(reference: Reference, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The gradient of a hypothetical loss, from the state before the step, which is put back."""
    after = {k: v.clone() for k, v in reference.model.state_dict().items()}
    reference.model.load_state_dict(reference.before)
    reference.optimizer.zero_grad(set_to_none=True)
    try:
        value = loss()
        if value.requires_grad:
            reference.back(value)
        return gradients_of(reference.model)
    finally:
        reference.optimizer.zero_grad(set_to_none=True)
        reference.model.load_state_dict(after)


def _together(reference: Reference, step: int, batch: Any, shares: Shares) -> list[Pair]:
    """Each share's losses, from one forward of the whole batch."""
    examples = len(batch.rows)
    reference.begin(step, batch.rows)
    outputs = reference.forward(batch.inputs)
    return [
        reference.objective(_rows(outputs, share, examples), _rows(batch.targets, share, examples))
        for share in shares
    ]


def _one_by_one(reference: Reference, step: int, batch: Any, shares: Shares) -> list[Pair]:
    """Each share's losses, from a forward of its own."""
    examples = len(batch.rows)
    pairs = []
    for share in shares:
        if share[1] > share[0]:
            reference.begin(step, batch.rows[slice(*share)])
            outputs = reference.forward(_rows(batch.inputs, share, examples))
            targets = _rows(batch.targets, share, examples)
            pairs.append(reference.objective(outputs, targets))
    return pairs


def gradient_of_rows(evidence: Evidence, rows: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """What some rows of the batch add to the right gradient: a forward pass for each range."""
    reference, step = evidence.reference, evidence.step
    batch, count = reference.batch(step), evidence.theirs.count or 1.0

    def loss() -> Tensor:
        pairs = _one_by_one(reference, step, batch, tuple(rows))
        return torch.stack([loss for loss, _ in pairs]).sum() / count

    return _gradient(reference, loss)


def _rows(tree: Any, share: tuple[int, int], examples: int) -> Any:
    return tree_map(
        lambda leaf: rows_of(leaf, share, examples) if isinstance(leaf, Tensor) else leaf, tree
    )
