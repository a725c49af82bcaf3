"""A step of replicas that have weights of their own: each updates its own, then all say how it was.

this rank's members   read → forward, backward → clip → update     (none with no examples)
all ranks             Σ loss, Σ count, flags
those that meet       meetings.after(step)
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shoal.comm import Pending
from shoal.job import Job
from shoal.train.located import located
from shoal.train.step import Flags, StepResult, refuse_loss
from shoal.train.times import Split, StepTimes


def apart_step(
    jobs: Sequence[Job], step: int, flags: Flags, times: StepTimes | None = None
) -> StepResult:
    """Do step `step` (0-based) of this rank's members. Collective; as `train_step`."""
    world = jobs[0].groups.world
    with located(world.rank, step):
        split = Split(times or StepTimes(), world.counter)
        results = [_one(job, step, split) for job in jobs]
        bad = [record for _, found, speaks in results if speaks for record in found]
        flags = replace(flags, bad_examples=float(len(bad)))
        own = torch.stack([sums for sums, _, _ in results]).sum(0)
        vector = torch.cat((own, flags.vector()))
        counts = vector if jobs[0].groups.within.world.rank == 0 else _without_sums(vector)
        loss, count, *shared = world.all_reduce(counts, "metric").tolist()
        if not math.isfinite(loss):
            refuse_loss(own, world, step)
        split.book("communication_exposed")
        for job in jobs:
            if job.meetings is not None:
                hidden = job.meetings.hidden_s
                job.meetings.after(step)
                split.hidden(job.meetings.hidden_s - hidden)
                job.replica.updated()
        split.book("communication_exposed")
    rate = float(jobs[0].optimizer.param_groups[0]["lr"])
    return StepResult(loss / count if count else 0.0, count, rate, Flags(*shared), bad)


def _without_sums(vector: Tensor) -> Tensor:
    """All ranks of a replica know its sums: one of them counts."""
    return torch.cat((vector.new_zeros(2), vector[2:]))


def _one(job: Job, step: int, split: Split) -> tuple[Tensor, Sequence[object], bool]:
    """One member's step: (Σ loss, Σ count) of its replica, what it could not read."""
    job.set_learning_rate(step)
    sums = torch.zeros(2, dtype=torch.float64)
    if not job.own_examples(step):
        if job.meetings is not None and job.meetings.gradients(step, 0.0):
            job.update()  # as the others do: the gradients are those of all
        return sums, (), False
    batch, share = job.read(step)
    split.book("input")

    def start(local: Tensor) -> Pending:
        split.book("forward")
        return job.agreement.share(local)

    sums = job.replica.forward_backward(batch, step, share, start).cpu()
    split.book("backward")
    job.agreement.agree(job.replica)
    loss, count = sums.tolist()
    job.replica.rescale(count)
    if job.meetings is not None:
        split.book("optimizer")
        job.meetings.gradients(step, count)
        split.book("communication_exposed")
    if math.isfinite(loss):  # else all ranks are told, and nothing of this step is kept
        job.update()
    split.book("optimizer")
    return sums, getattr(batch, "bad", ()), job.groups.within.speaks
