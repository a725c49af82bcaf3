"""Evaluation over all ranks: sums and counts, added once; nothing padded, nothing dropped."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.job import Job
from shoal.job.workload import Feed, local_batch
from shoal.parallel import call_objective


@dataclass(frozen=True)
class Evaluation:
    """``metrics``, equal on all ranks, and the examples that this rank could not read."""

    metrics: dict[str, float]
    bad: tuple[Any, ...]


def evaluate(job: Job) -> Evaluation:
    """Loss and metrics over the whole evaluation set. Collective.

    Each example (or token) counts once, for any size of the set and any number of ranks. No
    metrics if the workload has no evaluation set.
    """
    feed = job.workload.evaluation
    if feed is None:
        return Evaluation({}, ())
    names = ["loss", *job.workload.metrics]
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    bad: list[Any] = []
    with evaluating(job.replica.model):
        for step in range(feed.steps_per_epoch):
            sums += _one_batch(job, feed, step, names, bad)
    totals, counts = job.groups.data.all_reduce(sums, "evaluation").tolist()
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


def _one_batch(job: Job, feed: Feed, step: int, names: list[str], bad: list[Any]) -> Tensor:
    """Sums and counts of this rank's share: ``[2, metrics]`` in float64, on the CPU."""
    try:
        rank, last = job.groups.data.rank, feed.steps_per_epoch - 1
        batch, share = local_batch(feed, step, rank, job.replica, last)
        bad.extend(getattr(batch, "bad", ()))
        outputs: Any = job.replica.forward(batch, step, share)
        if share.is_empty(rank):  # it has stood in for one: no row of it counts
            return torch.zeros(2, len(names), dtype=torch.float64)
        pairs = [call_objective(job.workload.objective, outputs, batch.targets)]
        pairs += [job.workload.metrics[name](outputs, batch.targets) for name in names[1:]]
    except ShoalError as error:
        raise error.located(phase="evaluation") from error
    return torch.stack([torch.stack([_plain(value) for value in pair]) for pair in pairs], dim=1)


def _plain(value: Any) -> Tensor:
    return torch.as_tensor(value).detach().double().cpu()
