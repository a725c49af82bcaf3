"""One device: the workload in a plain loop of torch's own pieces, as a person would write it.

Nothing of what is to be verified is used here: no shares, no agreement, no replica. Two things of
Shoal's are, as they *define* what one device computes: statistics groups where the recipe asks for
`normalize_over: N`, and dropout masks (functions of the seed, not of a generator's state).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm import Group
from shoal.job import Workload
from shoal.parallel.randomness import StepKey, counted, intercepting, use_counted_dropout
from shoal.parallel.statistics import BatchGroups, use_groups
from shoal.verify.record import Record, gradients_of, outputs_by_name, silence_noise, state_after


class Reference:
    """The model on one device, step by step."""

    def __init__(self, workload: Workload, dtype: torch.dtype, device: torch.device) -> None:
        self.workload = workload
        self.dtype = dtype
        self.device = device
        self.model = workload.first_model(dtype).to(device)
        self._groups = BatchGroups(workload.normalize_over, Group(0, 1))
        if workload.normalize_over is not None:
            use_groups(self.model, self._groups)
        self._key = StepKey(workload.seed)
        use_counted_dropout(self.model, self._key)
        self.optimizer = workload.build_optimizer(self.model)
        self.before: dict[str, Any] = {}

    def batch(self, step: int) -> Any:
        """The whole global batch of a step."""
        feed = self.workload.feed
        whole = feed.read(step, 0, feed.batch_examples(step))
        return whole.to(self.device, self.dtype)

    def steps(self, steps: int) -> Iterator[Record]:
        """Train; after each step what it left behind. `before` is the model's state before it."""
        for step in range(steps):
            self.before = {k: v.clone() for k, v in self.model.state_dict().items()}
            yield self._step(step)

    def begin(self, step: int, rows: Tensor) -> None:
        """Set what the layers of Shoal's own need to know of a forward pass of these rows."""
        examples = self.workload.feed.batch_examples(step)
        self._groups.begin(rows, examples, [(0, examples)])
        self._key.begin(step, rows, 0)

    def outputs(self, inputs: Any) -> Any:
        """What the model makes of inputs, with the masks of the step that has begun."""
        with counted(self._key, self.model):
            return call(self.model, inputs)

    def backward(self, loss: Tensor) -> None:
        """Leave the gradient of `loss` in the parameters."""
        with intercepting(self._key):
            loss.backward()  # type: ignore[no-untyped-call]

    def _step(self, step: int) -> Record:
        batch = self.batch(step)
        self.begin(step, batch.rows)
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self.outputs(batch.inputs)
        loss_sum, count = self.workload.objective(outputs, batch.targets)
        loss = loss_sum / (count if float(count) else 1.0)
        self._groups.send()
        self.backward(loss)
        self._groups.finish()
        if self.workload.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.workload.clip_norm)
        record = Record(count=float(count))
        record.tensors["output"] = outputs_by_name(outputs)
        record.tensors["loss"] = {"loss": loss.detach().reshape(())}
        record.tensors["gradient"] = gradients_of(self.model)
        silence_noise(self.model, record.tensors["gradient"])
        self.optimizer.step()
        record.tensors |= state_after(self.model, self.optimizer)
        return record


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs for a tuple of inputs, or for one."""
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
