"""Why a strategy differs: each hypothesis is *computed* on one device and held against the ranks.

evidence ─┬─ between     ranks that hold the same, and have not the same
          ├─ shares      how the losses of the shares are put together
          ├─ outputs     other masks, rows, biases, partial sums
          ├─ gradients   multiples, some of the parts, one use of a tied parameter
          └─ updates     the optimizer's step in other ways
                         the first that gives what the ranks have, names the cause

cause = likely_cause(evidence)              # on rank 0, after the differing step
"""

from collections.abc import Callable

from shoal.verify.causes.between import between_ranks, of_stale
from shoal.verify.causes.gradients import of_gradients
from shoal.verify.causes.outputs import of_outputs
from shoal.verify.causes.shares import of_shares
from shoal.verify.causes.updates import of_norms, of_updates
from shoal.verify.evidence import Evidence

Investigation = Callable[[Evidence], str | None]

_BY_KIND: dict[str, tuple[Investigation, ...]] = {
    "output": (of_shares, of_outputs),
    "loss": (of_shares, of_gradients),
    "gradient": (between_ranks, of_shares, of_gradients),
    "gradient_norm": (of_norms,),
    "clipped": (between_ranks, of_norms),
    "buffer": (between_ranks,),
    "parameter": (of_stale, of_updates, between_ranks),
    "optimizer": (of_updates, between_ranks),
}


def likely_cause(evidence: Evidence) -> str:
    """The cause of the first difference, in words."""
    for investigate in _BY_KIND[evidence.first.kind]:
        text = investigate(evidence)
        if text is not None:
            return text
    return _by_kind(evidence)


def _by_kind(evidence: Evidence) -> str:
    """What the place of the first difference says, where no hypothesis fits."""
    mine, theirs = evidence.ranks[0].record.count, evidence.theirs.count
    if mine != theirs:
        return (
            f"the ranks counted {mine:g} where one device counts {theirs:g}: part of the batch was "
            "left out, read twice, or masked in another way"
        )
    return {
        "output": "the forward pass differs: other weights, other inputs, other random numbers, "
        "or a layer that looks across the batch",
        "loss": "outputs agree and the loss does not: how the shares' losses are put together",
        "gradient": "the loss agrees and a gradient does not: a sum over the wrong ranks, or a "
        "layer whose backward pass misses the other replicas",
        "gradient_norm": "gradients agree and their norm does not: it is not the whole model's",
        "clipped": "gradients agree and what the optimizer gets of them does not: how they are "
        "clipped",
        "buffer": "gradients agree and a buffer does not: running statistics were not updated "
        "from the whole batch, or updated twice",
        "parameter": "gradients agree and weights do not: weight decay, learning rate or the "
        "optimizer's state differ",
        "optimizer": "gradients agree and the optimizer's state does not",
    }[evidence.first.kind]
