"""One device: the workload in a plain loop of torch's own pieces, as a person would write it.

Nothing of what is to be verified is used here: no shares, no agreement, no replica. Two things of
Shoal's are, as they *define* what one device computes: statistics groups where the recipe asks for
`normalize_over: N`, and dropout masks (functions of the seed, not of a generator's state).
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shoal.comm import Group
from shoal.job import Workload
from shoal.parallel.randomness import StepKey, counted, intercepting, use_counted_dropout
from shoal.parallel.statistics import BatchGroups, use_groups
from shoal.verify.precision import Precision
from shoal.verify.record import Record, gradients_of, outputs_by_name, silence_noise, state_after

FULL = Precision("float64")


class Reference:
    """The model on one device, step by step."""

    def __init__(
        self, workload: Workload, device: torch.device, precision: Precision = FULL
    ) -> None:
        self.workload = workload
        self.precision = precision
        self.device = device
        self.model = workload.first_model(precision.dtype).to(device)
        self._groups = BatchGroups(workload.normalize_over, Group(0, 1))
        if workload.normalize_over is not None:
            use_groups(self.model, self._groups)
        self._key = StepKey(workload.seed)
        use_counted_dropout(self.model, self._key)
        self.optimizer = workload.build_optimizer(self.model)
        # The state before the step that was done last, for hypotheses about it.
        self.before: dict[str, Any] = {}
        self.earlier: dict[str, Any] = {}
        self.optimizer_before: dict[str, Any] = {}

    def batch(self, step: int) -> Any:
        """The whole global batch of a step."""
        feed = self.workload.feed
        whole = feed.read(step, 0, feed.batch_examples(step))
        return whole.to(self.device, self.precision.dtype)

    def steps(self, steps: int) -> Iterator[Record]:
        """Train; after each step what it left behind. `before` is the model's state before it."""
        for step in range(steps):
            yield self.step(step)

    def begin(
        self, step: int, rows: Tensor, masks: Tensor | None = None, *, of_step: int | None = None
    ) -> None:
        """Set what the layers of Shoal's own need to know of a forward pass of these rows.

        ``masks``: the rows whose dropout masks are used, where they are others; ``of_step``: the
        step whose masks.
        """
        examples = self.workload.feed.batch_examples(step)
        self._groups.begin(rows, examples, [(0, examples)])
        self._key.begin(step if of_step is None else of_step, rows if masks is None else masks, 0)

    def forward(self, inputs: Any) -> Any:
        """The model's outputs, with the masks of the step that `begin` has set."""
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.bf16),
            counted(self._key, self.model),
        ):
            return call(self.model, inputs)

    def objective(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """(sum of losses, count)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.bf16):
            return self.workload.objective(outputs, targets)

    def back(self, loss: Tensor) -> None:
        """Back-propagate a loss that `forward` has led to."""
        with intercepting(self._key):
            loss.backward()  # type: ignore[no-untyped-call]

    def step(self, step: int, right: Record | None = None) -> Record:
        """Do one step. ``right``: the same step in float64, which says what is rounding only."""
        self.earlier = self.before
        self.before = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.optimizer_before = copy.deepcopy(self.optimizer.state_dict())
        batch = self.batch(step)
        self.begin(step, batch.rows)
        self.optimizer.zero_grad(set_to_none=True)
        outputs = self.forward(batch.inputs)
        loss_sum, count = self.objective(outputs, batch.targets)
        loss = loss_sum / (count if float(count) else 1.0)
        self._groups.send()
        self.back(loss)
        self._groups.finish()
        record = Record(count=float(count))
        record.tensors["output"] = outputs_by_name(outputs)
        record.tensors["loss"] = {"loss": loss.detach().reshape(())}
        record.tensors["gradient"] = gradients_of(self.model)
        record.tensors["gradient_norm"] = {"gradient norm": self._clip()}
        record.tensors["clipped"] = gradients_of(self.model)
        silence_noise(self.model, (right or record).tensors["gradient"])
        self.optimizer.step()
        record.tensors |= state_after(self.model, self.optimizer)
        return record

    def _clip(self) -> Tensor:
        """Clip, if the workload asks for it; the gradient's norm before that."""
        limit = self.workload.clip_norm
        if limit is not None:
            return nn.utils.clip_grad_norm_(self.model.parameters(), limit).detach()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs for a tuple of inputs, or for one."""
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)
