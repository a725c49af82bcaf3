"""Evaluation over all ranks: sums and counts, added once; nothing padded, nothing dropped."""

from typing import Any

import torch

from shoal.errors import ShoalError
from shoal.job import Job
from shoal.job.workload import Feed, local_batch
from shoal.parallel import call_objective


def evaluate(job: Job) -> dict[str, float]:
    """Loss and metrics over the whole evaluation set. Collective; equal on all ranks.

    Each example (or token) counts once, for any size of the set and any number of ranks. Empty if
    the workload has no evaluation set.
    """
    feed = job.workload.evaluation
    if feed is None:
        return {}
    model = job.replica.model
    was_training = model.training
    model.eval()
    names = ["loss", *job.workload.metrics]
    sums = torch.zeros(2, len(names), dtype=torch.float64)
    try:
        for step in range(feed.steps_per_epoch):
            sums += _one_batch(job, feed, step, names)
    finally:
        model.train(was_training)
    totals, counts = job.groups.data.all_reduce(sums, "evaluation").tolist()
    return {
        name: total / count
        for name, total, count in zip(names, totals, counts, strict=True)
        if count
    }


def _one_batch(job: Job, feed: Feed, step: int, names: list[str]) -> torch.Tensor:
    """Sums and counts of this rank's rows: ``[2, metrics]`` in float64, on the CPU."""
    try:
        rank, last = job.groups.data.rank, feed.steps_per_epoch - 1
        batch, share = local_batch(feed, step, rank, job.replica, last)
        outputs: Any = job.replica.forward(batch, step, share)
        pairs = [call_objective(job.workload.objective, outputs, batch.targets)]
        pairs += [job.workload.metrics[name](outputs, batch.targets) for name in names[1:]]
    except ShoalError as error:
        raise error.located(phase="evaluation") from error
    return torch.stack(
        [torch.stack([torch.as_tensor(value).detach().double().cpu() for value in pair]) for pair in pairs],
        dim=1,
    )
