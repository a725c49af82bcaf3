"""One model of several: parameters averaged, batch-norm statistics estimated anew.

    mean = (θ_0 + … + θ_{n−1}) / n          in float64, rounded once; whole numbers are the first's

    state = average([one, two])
    model.load_state_dict(state)
    estimate_statistics(model, feed)        # forward passes over training data

The running statistics of an average are not the average of the running statistics: units whose
inputs were averaged have less variance (Izmailov et al. 2018, arXiv 1803.05407, section 3.2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from shoal.errors import Refused
from shoal.job import Feed
from shoal.predict.permutations import State

MAX_EXAMPLES = 16_384  # that statistics are estimated from: their error is then under 1 %


def average(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of states of equal names and shapes (default: equal weights)."""
    shares = [1.0 / len(states)] * len(states) if weights is None else list(weights)
    mean: dict[str, Tensor] = {}
    for name, first in states[0].items():
        if not first.is_floating_point():
            mean[name] = first.clone()
            continue
        total = torch.zeros_like(first, dtype=torch.float64)
        for state, share in zip(states, shares, strict=True):
            total += state[name].double() * share
        mean[name] = total.to(first.dtype)
    return mean


def check_alike(names: Sequence[str], states: Sequence[State]) -> None:
    """Raise `Refused` naming the first tensor in which one differs from the first."""
    first = {name: tuple(tensor.shape) for name, tensor in states[0].items()}
    for who, state in zip(names[1:], states[1:], strict=True):
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if shapes == first:
            continue
        name = next(n for n in [*first, *shapes] if first.get(n) != shapes.get(n))
        here, there = (_shape_text(each.get(name)) for each in (first, shapes))
        raise Refused(
            f"{names[0]} and {who} are unlike models: {name} {here} in the first, {there} in the "
            "second, so their parameters cannot be averaged",
            hint="--how ensemble predicts with unlike models.",
        )


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "is not there" if shape is None else f"has shape {list(shape)}"


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The layers that have running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@torch.no_grad()
def estimate_statistics(
    model: nn.Module, feed: Feed, device: torch.device, max_examples: int = MAX_EXAMPLES
) -> int:
    """Set running statistics to the mean of those of training batches; how many examples it took.

    Whole batches of the first epoch, as training reads them; a set smaller than one is read whole.
    Only batch norms are in training mode meanwhile, and each module afterwards in its own.
    """
    norms = norms_of(model)
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    whole = [s for s in range(feed.steps_per_epoch) if _is_whole(feed, s)]
    seen = 0
    try:
        for step in whole or [0]:
            if seen >= max_examples:
                break
            batch = feed.read(step, 0, feed.batch_examples(step)).to(device)
            model(*batch.inputs) if isinstance(batch.inputs, tuple) else model(batch.inputs)
            seen += len(batch.rows)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    return seen


def _is_whole(feed: Feed, step: int) -> bool:
    return feed.batch_examples(step) == feed.batch_examples(0)
