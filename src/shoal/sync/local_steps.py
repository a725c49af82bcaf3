"""`local:H`: local SGD. Weights are averaged every H steps (Stich 2019, Lin et al. 2020).

    w_r ← Σ_r (examples of r since the last meeting ÷ those of all) · w_r

Float buffers (running statistics) are averaged as well, before step `after` at each step; and with
`state=average` what the optimizer keeps of each parameter. The last step of a run ends with a
meeting. Before step `after` replicas sum their gradients, as under `sync` (post-local SGD).

With compression it is the change since the last meeting that is sent, and the weights of that
meeting are kept: the largest numbers of the weights themselves say nothing about what was learned.
"""

import torch
from torch import Tensor

from shoal.strategy import Local
from shoal.sync.average import average
from shoal.sync.bucket import Bucket, cut
from shoal.sync.changes import Changes
from shoal.sync.choose import sums_of
from shoal.sync.meetings import MeanOfReplicas, Setting, floating, trained
from shoal.sync.optimizer_mean import average_state
from shoal.sync.rounds import Rounds
from shoal.sync.sums import Line

BUCKET_BYTES = 8 << 20


class LocalSteps(MeanOfReplicas):
    """Replicas that average their weights every so many steps."""

    hidden_s = 0.0

    def __init__(self, agreement: Local, setting: Setting) -> None:
        super().__init__(setting)
        self._how, self._setting = agreement, setting
        self._rounds = Rounds(agreement.every, setting.total_steps, agreement.after)
        self._buckets: list[Bucket] = []
        self._changes: Changes | None = None
        self._plain = list(floating(setting.model).values())
        parameters = {id(each) for each in setting.model.parameters()}
        self._buffers = [each for each in self._plain if id(each) not in parameters]
        if setting.compress is not None:
            weights = trained(setting.model)
            line = Line(setting.between, "parameter", place=setting.place)
            self._changes = Changes(weights, sums_of(setting.compress, line, weights))
            learned = {id(each) for each in weights.values()}
            self._plain = [each for each in self._plain if id(each) not in learned]

    def gradients(self, step: int, count: float) -> bool:
        """Before ``after`` replicas agree on each step's gradient, as under `sync`."""
        group = self._setting.between
        if step >= self._how.after or group.size == 1:
            return False
        counts = torch.tensor([count], dtype=torch.float64)
        total: float = group.all_reduce(counts, "agreement").item()
        share = count / total if total else 0.0
        if not self._buckets:
            self._buckets = cut(trained(self._setting.model).values(), BUCKET_BYTES)
        for bucket in self._buckets:
            _sum_gradients(bucket, share, self._setting)
        return True

    def after(self, step: int) -> None:
        """Average, where a meeting is due."""
        self.are_equal = step < self._how.after
        if self.are_equal and self._buffers:  # a replica's batch has statistics of its own
            average(self._buffers, self._setting.share(step, step), self._setting.between)
        if self._changes is not None and step + 1 == self._how.after:
            self._changes.begin_here()
        if not self._rounds.ends(step):
            return
        share = self._setting.share(self._rounds.first(step), step)
        average(self._plain, share, self._setting.between)
        if self._changes is not None:
            self._changes.start(share)
            for _, weight, last, change in self._changes.arrived():
                weight.copy_(last.add_(change))
        if self._how.state == "average":
            average_state(self._setting, share)
        self.are_equal = True

    def state(self) -> dict[str, Tensor]:
        return {} if self._changes is None else self._changes.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if self._changes is not None:
            self._changes.restore(tensors)


def _sum_gradients(bucket: Bucket, share: float, setting: Setting) -> None:
    """Make of each replica's mean gradient the mean of all; none where no replica has any."""
    for parameter in bucket.parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(share)
            bucket.arrived.add(id(parameter))
    bucket.fill()
    used = len(bucket.parameters)
    setting.between.all_reduce_later(bucket.flat, "gradient", agreement=used).wait()
    bucket.settle()
