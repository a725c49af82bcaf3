"""One rank's part of a prediction: forward passes, and what they give in the order of the data.

    one model, dp2       rank 0: rows 0..64 of each batch      rank 1: rows 64..128
    members, dp2         rank 0: members 0 2 4                 rank 1: members 1 3, all rows each
    rank 0 writes        the batch's rows in order; of members the mean of their probabilities,
                         summed in the members' order

Ensembles have the same bits whatever the number of ranks: a member is computed whole, on the same
rows and with the same number of threads, and the sum is over members in order.
"""

import contextlib
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shoal.comm import Groups
from shoal.data import Feed
from shoal.errors import BadExample, Refused, RunError, Stopped
from shoal.job import Execution, Job, assemble, workload_of
from shoal.job.workload import local_batch
from shoal.launch import Context
from shoal.predict.bench import probabilities_of
from shoal.predict.evaluation import evaluating
from shoal.predict.inputs import Spec
from shoal.predict.members import Member
from shoal.predict.parts import PartsFolder, Rows
from shoal.strategy import EVERY_STEP, Strategy

_MEMBER, _ROW, _ID, _LABEL, _FIRST = range(5)  # columns of what ranks send each other


@dataclass(frozen=True)
class PredictTask:
    """What every rank is told: plain values. ``labels``: what a label of the data is to the model,
    None for the same; ``first``: the first batch that is not there yet."""

    members: tuple[dict[str, Any], ...]
    ensemble: bool
    strategy: str
    device: str
    spec: Spec
    folder: str
    first: int = 0
    labels: list[int] | None = None


def predict_on_rank(context: Context, task: PredictTask) -> dict[str, Any]:
    """Predict all batches from the first that is missing. Collective over the context's ranks."""
    torch.set_num_threads(context.threads)
    strategy = Strategy.parse(task.strategy)
    groups = Groups.form(
        context.rank,
        context.world_size,
        context.store,
        context.generation,
        _device(task.device, context.local_rank),
        axes=strategy.axes,
        apart=task.ensemble,
    )
    work = _Work(groups, task, strategy)
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for _, job, _ in work.jobs:
            stack.enter_context(evaluating(job.replica.model))
        for step in range(task.first, work.steps):
            if context.world_size == 1 and context.stop_requested.is_set():
                raise Stopped(f"stopped after {step} of {work.steps} batches")
            work.do(step)
    seconds = time.perf_counter() - began
    groups.close()
    return {"seconds": seconds, "batches": work.steps - task.first, "bad": work.bad}


def _given(model: nn.Module) -> nn.Module:
    return model


def _device(kind: str, local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank) if kind == "cuda" else torch.device("cpu")


class _Work:
    """The members that are this rank's, each with its job and feed."""

    def __init__(self, groups: Groups, task: PredictTask, strategy: Strategy) -> None:
        self.groups, self.task = groups, task
        # What is for training alone would only take memory.
        execution = replace(
            Execution.of(strategy), agreement=EVERY_STEP, zero=0, offload=False, recompute=False
        )
        between = groups.between
        members = [Member(**each) for each in task.members]
        own = range(between.rank, len(members), between.size) if task.ensemble else range(1)
        self.jobs: list[tuple[int, Job, Feed]] = []
        for number in own:
            member = members[number]
            workload = workload_of(member.recipe, keeps_a_tenth=member.solo)
            model = member.model(workload)
            # Batch norm uses its running statistics here. Over whole batches, which microbatches
            # forbid in training, it would be refused.
            over = workload.normalize_over or (2 if strategy.pp > 1 else None)
            made = replace(workload, build_model=partial(_given, model), normalize_over=over)
            job = assemble(groups, made, execution)
            self.jobs.append(
                (number, job, task.spec.open(member.recipe, members[0].recipe.batch_size))
            )
        # A rank without members has the data's sizes all the same.
        feed = self.jobs[0][2] if self.jobs else task.spec.open(members[0].recipe)
        self.feed, self.steps = feed, feed.steps_per_epoch
        self.slots = -(-len(members) // between.size) if task.ensemble else 1
        self.bad = 0
        self._classes = 0
        self._parts = PartsFolder(Path(task.folder))

    def do(self, step: int) -> None:
        """One batch. Collective."""
        found = [self._forward(number, job, feed, step) for number, job, feed in self.jobs]
        blocks = [block for block in found if block is not None]
        if not self._classes:
            self._agree_on_classes(blocks)
        rows = self.slots * self.feed.batch_examples(step)
        sent = torch.full((rows, _FIRST + self._classes), -1.0, dtype=torch.float64)
        place = 0
        for block in blocks:
            if block.shape[1] != sent.shape[1]:
                raise Refused(
                    f"members answer with {block.shape[1] - _FIRST} and {self._classes} classes",
                    hint="An ensemble's members answer with the same classes.",
                )
            sent[place : place + len(block)] = block
            place += len(block)
        gathered = self.groups.world.all_gather(sent, "evaluation").flatten(0, 1)
        if self.groups.world.rank == 0:
            self._parts.write(step, self._joined(gathered))

    def _forward(self, number: int, job: Job, feed: Feed, step: int) -> Tensor | None:
        """A row for each example that this rank answers for; None where another rank does."""
        rank = job.groups.within.data.rank
        batch, share = local_batch(feed, step, rank, job.replica, self.steps - 1)
        outputs = job.replica.forward(batch, step, share)
        self.bad += len(getattr(batch, "bad", ())) if number == 0 else 0
        if not job.replica.judges or share.is_empty(rank):
            return None
        probabilities = probabilities_of(outputs).cpu()
        about: Any = batch
        columns = [torch.full_like(about.ids, number), about.rows, about.ids, self._labels(about)]
        if int(columns[-1].max()) >= probabilities.shape[1]:
            raise BadExample(
                f"label {int(columns[-1].max())} is outside 0..{probabilities.shape[1] - 1}, the "
                "classes that the model answers with",
                hint="Give data with the labels that it was trained on.",
                step=step,
            )
        head = torch.stack([column.cpu().double() for column in columns], 1)
        return torch.cat((head, probabilities), 1)

    def _labels(self, batch: Any) -> Tensor:
        labels: Tensor = batch.targets
        if labels.dim() != 1 or labels.is_floating_point():
            return torch.full_like(batch.ids, -1)
        if self.task.labels is None:
            return labels
        known = torch.tensor(self.task.labels)
        return torch.where(labels >= 0, known[labels.clamp(min=0)], -1)

    def _agree_on_classes(self, blocks: list[Tensor]) -> None:
        own = max((block.shape[1] - _FIRST for block in blocks), default=0)
        largest = torch.tensor([own], dtype=torch.int64)
        self.groups.world.all_reduce(largest, "evaluation", largest=True)
        self._classes = int(largest)

    def _joined(self, gathered: Tensor) -> Rows:
        """All rows of the batch, in order; over members the mean of probabilities."""
        known = gathered[gathered[:, _ROW] >= 0]
        count = len(self.task.members) if self.task.ensemble else 1
        total: Tensor | None = None
        for number in range(count):
            block = known[known[:, _MEMBER] == number]
            block = block[block[:, _ROW].argsort()]
            if total is not None and not torch.equal(total[:, :_FIRST][:, 1:3], block[:, 1:3]):
                raise RunError("members have not read the same examples")
            if total is None:
                total = block.clone()
            else:
                total[:, _FIRST:] += block[:, _FIRST:]
        assert total is not None
        values = total.numpy()
        return Rows(_whole(values[:, _ID]), _whole(values[:, _LABEL]), values[:, _FIRST:] / count)


def _whole(column: NDArray[np.float64]) -> NDArray[np.int64]:
    return column.astype(np.int64)
