"""`local:H`: local SGD. Weights are averaged every H steps (Stich 2019, Lin et al. 2020).

    w_r ← Σ_r (examples of r since the last meeting ÷ those of all) · w_r

Float buffers (running statistics) are averaged as well, and with `state=average` what the optimizer
keeps of each parameter. The last step of a run ends with a meeting.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from shoal.strategy import Local
from shoal.sync.average import average
from shoal.sync.meetings import Setting, exchanged, floating


class LocalSteps:
    """Replicas that average their weights every so many steps."""

    hidden_s = 0.0

    def __init__(self, agreement: Local, setting: Setting) -> None:
        self._how, self._setting = agreement, setting
        self._floating = list(floating(setting.model).values())

    def gradients(self, step: int, count: float) -> float:
        """Before ``after`` replicas agree on each step's gradient, as under `sync`."""
        group = self._setting.between
        if step >= self._how.after or group.size == 1:
            return count
        parameters = [p for p in self._setting.model.parameters() if p.requires_grad]
        for parameter in parameters:  # a parameter that this replica did not use may be another's
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        counts = torch.tensor([count], dtype=torch.float64)
        total: float = group.all_reduce(counts, "agreement").item()
        share = count / total if total else 0.0
        average([p.grad for p in parameters if p.grad is not None], share, group)
        return total

    def after(self, step: int) -> None:
        """Average, where a meeting is due."""
        if self._due(step):
            share = self._share(step)
            average(self._floating, share, self._setting.between)
            if self._how.state == "average":
                average(self._state(), share, self._setting.between)

    def _due(self, step: int) -> bool:
        if step < self._how.after:
            return False
        last = step + 1 == self._setting.total_steps
        return last or (step + 1 - self._how.after) % self._how.every == 0

    def _share(self, step: int) -> float:
        """This replica's share of the examples since the last meeting."""
        first = step - (step - self._how.after) % self._how.every
        seen = [self._setting.examples(each) for each in range(first, step + 1)]
        of_each = [sum(column) for column in zip(*seen, strict=True)]
        return of_each[self._setting.between.rank] / sum(of_each)

    def _state(self) -> list[Tensor]:
        """What the optimizer keeps of each parameter, number by number."""
        found = []
        for parameter in self._setting.model.parameters():
            kept = self._setting.optimizer.state.get(parameter, {})
            found += [kept[key] for key in sorted(kept) if _is_like(kept[key], parameter)]
        return found

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """With the mean of all replicas' weights."""
        means = [tensor.detach().clone() for tensor in self._floating]
        average(means, 1 / self._setting.between.size, self._setting.between)
        with exchanged(self._floating, means):
            yield

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        return


def _is_like(value: object, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
