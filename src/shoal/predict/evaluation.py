"""Evaluation over all ranks: sums and counts, added once; nothing padded, nothing dropped.

    each rank, each batch   Σ loss, Σ right, …, counts   ──▶  added up on the device, in float64
    at the end              one copy to the host, one sum over the ranks

    evaluate(job).metrics               # {"loss": 0.31, "accuracy": 0.908}, on every rank

The forward pass runs under `torch.no_grad`, not `inference_mode`: a module may keep a tensor that
it made here (a mask, a table of positions), and training could not use one of inference mode.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm import Group
from shoal.errors import ShoalError
from shoal.job import Job
from shoal.job.sharing import Feed
from shoal.job.workload import local_batch
from shoal.parallel import call_objective


@dataclass(frozen=True)
class Evaluation:
    """``metrics``, equal on all ranks, and the examples that this rank could not read."""

    metrics: dict[str, float]
    bad: tuple[Any, ...]
    members: tuple[dict[str, float], ...] = ()  # of each model, where there are several


def evaluate(job: Job, group: Group | None = None) -> Evaluation:
    """Loss and metrics over the whole evaluation set. Collective over `group`, or else all ranks.

    Each example (or token) counts once, for any size of the set and any number of ranks. No
    metrics if the workload has no evaluation set.
    """
    feed, group = job.evaluation or job.workload.evaluation, group or job.groups.world
    if feed is None:
        return Evaluation({}, ())
    names = ["loss", *job.workload.metrics]
    # On the device: a copy to the host after each batch would wait for the whole forward pass.
    sums = torch.zeros(2, len(names), dtype=torch.float64, device=job.replica.device)
    bad: list[Any] = []
    with evaluating(job.replica.model):
        for step in range(feed.steps_per_epoch):
            pairs = _one_batch(job, feed, step, names, bad)
            if pairs:
                sums += _stacked(pairs, sums.device)
    totals, counts = group.all_reduce(sums.cpu(), "evaluation").tolist()
    metrics = {
        name: total / count
        for name, total, count in zip(names, totals, counts, strict=True)
        if count
    }
    return Evaluation(metrics, tuple(bad))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards each in the mode that it had.

    Modes may differ within a model: a user may keep some of its batch statistics frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _one_batch(
    job: Job, feed: Feed, step: int, names: list[str], bad: list[Any]
) -> list[tuple[Any, Any]]:
    """(sum, count) of this rank's share, for each name; none where it has no example of its own."""
    try:
        rank, last = job.groups.within.data.rank, feed.steps_per_epoch - 1
        if not feed.batch_examples(step):
            return []
        batch, share = local_batch(feed, step, rank, job.replica, last)
        if job.groups.within.speaks:  # all ranks of a replica read the same rows
            bad.extend(getattr(batch, "bad", ()))
        outputs: Any = job.replica.forward(batch, step, share)
        # Another rank of the replica has them, or it has stood in: no row of it counts.
        if not job.replica.judges or share.is_empty(rank):
            return []
        pairs: list[tuple[Any, Any]]
        pairs = [call_objective(job.workload.objective, outputs, batch.targets)]
        pairs += [job.workload.metrics[name](outputs, batch.targets) for name in names[1:]]
    except ShoalError as error:
        raise error.located(phase="evaluation") from error
    return pairs


def _stacked(pairs: list[tuple[Any, Any]], device: torch.device) -> Tensor:
    """``[2, metrics]`` in float64: sums above counts. A user's function may give plain numbers."""
    values = [[torch.as_tensor(value).detach() for value in pair] for pair in pairs]
    return torch.stack(
        [
            torch.stack([value.to(device, torch.float64) for value in row])
            for row in zip(*values, strict=True)
        ]
    )
