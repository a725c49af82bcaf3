"""One training step: read → forward, backward → agree → rescale → clip → update.

Beside the sums of losses and counts, one small vector carries what the ranks have to decide
together: whether one was asked to stop, what rank 0's clock says, how many examples were bad,
whether a checkpoint could not be saved meanwhile.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shoal.comm import Group, Pending
from shoal.errors import NotFinite
from shoal.job import Job
from shoal.train.located import located
from shoal.train.times import Split, StepTimes


@dataclass(frozen=True)
class Flags:
    """What a rank brings to the agreement of a step; summed, they are what all ranks see.

    ``stop``: 1 where this rank was asked to. ``seconds``: rank 0's clock, 0 from all others.
    ``save_failed``: 1 where this rank knows that the checkpoint in the background has failed.
    """

    stop: float = 0.0
    seconds: float = 0.0
    bad_examples: float = 0.0
    save_failed: float = 0.0

    def vector(self) -> Tensor:
        """As float64, to be summed."""
        values = [self.stop, self.seconds, self.bad_examples, self.save_failed]
        return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class StepResult:
    """What a step was: the global batch's loss (a mean), its count, the rate, the shared flags.

    ``bad``: the examples that this rank could not read and has left out. ``lost``: whether a worker
    has died that the others go on without, up to here.
    """

    loss: float
    count: float
    learning_rate: float
    flags: Flags
    bad: Sequence[Any] = ()
    lost: bool = False


def train_step(job: Job, step: int, flags: Flags, times: StepTimes | None = None) -> StepResult:
    """Do step `step` (0-based) on this rank. Collective; all but ``bad`` is equal on all ranks.

    ``times``: where to book what the parts of the step took. Raises `NotFinite` on every rank,
    naming the first rank whose loss was not a number.
    """
    with located(job.groups.world.rank, step):
        return _step(job, step, flags, Split(times or StepTimes(), job.groups.world.counter))


def _step(job: Job, step: int, flags: Flags, split: Split) -> StepResult:
    batch, share = job.read(step)
    bad = getattr(batch, "bad", ())
    # All ranks of a replica read the same rows: one of them counts.
    flags = replace(flags, bad_examples=float(len(bad)) if job.groups.speaks else 0.0)
    learning_rate = job.set_learning_rate(step)
    split.book("input")
    own: list[Tensor] = []

    def start(local: Tensor) -> Pending:
        split.book("forward")
        own.append(local)
        return job.agreement.share(torch.cat((local, flags.vector().to(local.device))))

    totals = job.replica.forward_backward(batch, step, share, start)
    split.book("backward")
    loss_sum, count, *shared = totals.tolist()
    hidden = job.agreement.hidden_s
    job.agreement.agree(job.replica)
    # Not before: a rank that has not used every parameter still has gradients to send, and would
    # make this collective while others wait for them.
    if not math.isfinite(loss_sum):
        refuse_loss(own[0], job.groups.world, step)
    split.hidden(job.agreement.hidden_s - hidden)
    split.book("communication_exposed")
    job.replica.rescale(count)
    job.update()
    split.book("optimizer")
    loss = loss_sum / count if count else 0.0
    return StepResult(loss, count, learning_rate, Flags(*shared), bad)


def refuse_loss(local: Tensor, group: Group, step: int) -> None:
    """Name the first rank whose own sum of losses is not finite."""
    sums = group.all_gather(local[:1], "metric").flatten().tolist()
    wrong = [(rank, value) for rank, value in enumerate(sums) if not math.isfinite(value)]
    rank, value = wrong[0] if wrong else (None, math.inf)  # finite sums whose sum is not
    raise NotFinite(
        f"the loss is {value}",
        hint="Nothing of this step was kept, and checkpoints made before it are good. Common "
        "causes: a learning rate that is too high, a logarithm or a division of zero, bad inputs. "
        "Try a smaller optimizer.lr, a schedule with warmup, or optimizer.clip_norm.",
        rank=rank,
        step=step,
        phase="loss",
    )
