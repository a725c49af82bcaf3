"""The strategy's own training, watched: the calls that a run makes, and what each step leaves."""

import torch

from shoal.job import Job
from shoal.train.step import Flags, train_step
from shoal.verify.record import Record, gradients_of, outputs_by_name, silence_noise, state_after


class Observed:
    """A job whose steps leave records. Outputs are this rank's rows."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._gradients: dict[str, torch.Tensor] = {}
        self._reference: dict[str, torch.Tensor] = {}
        job.replica.capture()
        # What the optimizer gets to see: summed, clipped.
        job.optimizer.register_step_pre_hook(self._keep_gradients)

    def _keep_gradients(self, *_: object) -> None:
        self._gradients = gradients_of(self.job.replica.holding)
        silence_noise(self.job.replica.holding, self._reference, self.job.replica.layout)

    def step(self, step: int, reference: Record) -> Record:
        """Train one step, which on one device left `reference`. Collective."""
        self._reference = reference.tensors["gradient"]
        result = train_step(self.job, step, Flags())
        record = Record(count=result.count)
        record.tensors["output"] = outputs_by_name(self.job.replica.captured)
        record.tensors["loss"] = {"loss": torch.tensor(result.loss, dtype=torch.float64)}
        record.tensors["gradient"] = self._gradients
        record.tensors |= state_after(self.job.replica.holding, self.job.optimizer)
        return record
