"""The strategy's own training, watched: the calls that a run makes, and what each step leaves."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from shoal.job import Job
from shoal.train.step import Flags, train_step
from shoal.verify.record import Record, gradients_of, outputs_by_name, silence_noise, state_after


class _WatchedJob(Job):
    """A job that says when gradients are summed, and nothing has been done with them yet."""

    summed: Callable[[], None]

    @classmethod
    def of(cls, job: Job, summed: Callable[[], None]) -> "_WatchedJob":
        watched = cls(**{each.name: getattr(job, each.name) for each in fields(job)})
        watched.summed = summed
        return watched

    def update(self) -> Tensor | None:
        self.summed()
        return super().update()


class Observed:
    """A job whose steps leave records. Outputs are this rank's rows."""

    def __init__(self, job: Job) -> None:
        self.job = _WatchedJob.of(job, self._keep_gradients)
        self._gradients: dict[str, Tensor] = {}
        self._clipped: dict[str, Tensor] = {}
        self._norm = torch.zeros(())
        self._reference: dict[str, Tensor] = {}
        job.replica.capture()
        # What the optimizer gets to see: summed, clipped.
        job.optimizer.register_step_pre_hook(self._keep_clipped)

    def _keep_gradients(self) -> None:
        self._gradients = gradients_of(self.job.replica.holding)
        self._norm = self.job.replica.gradient_norm().detach().clone().reshape(())

    def _keep_clipped(self, *_: object) -> None:
        self._clipped = gradients_of(self.job.replica.holding)
        silence_noise(self.job.replica.holding, self._reference, self.job.replica.layout)

    def step(self, step: int, reference: Record) -> Record:
        """Train one step, which on one device left `reference`. Collective."""
        self._reference = reference.tensors["gradient"]
        result = train_step(self.job, step, Flags())
        record = Record(count=result.count)
        record.tensors["output"] = outputs_by_name(self.job.replica.captured)
        record.tensors["loss"] = {"loss": torch.tensor(result.loss, dtype=torch.float64)}
        record.tensors["gradient"] = self._gradients
        record.tensors["gradient_norm"] = {"gradient norm": self._norm}
        record.tensors["clipped"] = self._clipped
        record.tensors |= state_after(self.job.replica.holding, self.job.optimizer)
        return record
