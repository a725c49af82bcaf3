"""Bugs of the kinds that people meet, planted on the ranks for the time of one verification.

Each is a context manager that changes Shoal in this process and puts it back.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch

from shoal.comm import Pending
from shoal.parallel import Share
from shoal.sync import EveryStep


@contextlib.contextmanager
def gradients_not_summed() -> Iterator[None]:
    with mock.patch.object(EveryStep, "_sum", lambda self, bucket: Pending(bucket.flat)):
        yield


@contextlib.contextmanager
def gradients_averaged() -> Iterator[None]:
    summed = EveryStep._sum

    def average(self, bucket):
        pending = summed(self, bucket)
        pending.wait().div_(self._group.size)
        return pending

    with mock.patch.object(EveryStep, "_sum", average):
        yield


@contextlib.contextmanager
def _divided(divisor) -> Iterator[None]:
    """Each rank divides its losses by a number of its own: divisor(share, rank, own count)."""
    from shoal.parallel import Body, Replica

    begin, forward, summed = Replica._begin, Body.forward, EveryStep.share
    seen = {}

    def note(self, batch, step, share: Share, *number, **how):
        seen["share"], seen["rank"] = share, self.rank
        return begin(self, batch, step, share, *number, **how)

    def scaled(self, *batch, **how):
        total, count = forward(self, *batch, **how)
        own = divisor(seen["share"], seen["rank"], max(1.0, float(count)))
        return total * (seen["share"].batch_examples / own), count

    def share(self, vector):
        totals = summed(self, vector).wait()
        totals[1] = seen["share"].batch_examples
        return Pending(totals)

    with (
        mock.patch.object(Replica, "_begin", note),
        mock.patch.object(Body, "forward", scaled),
        mock.patch.object(EveryStep, "share", share),
    ):
        yield


@contextlib.contextmanager
def mean_of_means() -> Iterator[None]:
    """Each rank divides by its own count, and the ranks' results are averaged."""
    with _divided(lambda share, rank, own: own * len(share.shares)):
        yield


@contextlib.contextmanager
def tokens_weighted_as_examples() -> Iterator[None]:
    """Shares weigh by their examples, though the objective counts unmasked tokens."""

    def divisor(share: Share, rank: int, own: float) -> float:
        start, stop = share.shares[rank]
        return own * share.batch_examples / max(1, stop - start)

    with _divided(divisor):
        yield


@contextlib.contextmanager
def statistics_not_synchronised() -> Iterator[None]:
    with mock.patch("shoal.parallel.use_groups", return_value=0):
        yield


@contextlib.contextmanager
def last_rows_dropped() -> Iterator[None]:
    """What does not divide by the number of ranks is left out."""

    def equal_shares(examples: int, ranks: int, _multiple: int = 1) -> Share:
        each = examples // ranks
        return Share(each * ranks, tuple((r * each, (r + 1) * each) for r in range(ranks)))

    with mock.patch("shoal.job.workload.share_of", equal_shares):
        yield


@contextlib.contextmanager
def running_statistics_of_one_rank() -> Iterator[None]:
    """Buffers are updated from rank 0's mean only, where they are sums over ranks."""
    from shoal.parallel import GroupBatchNorm

    right = GroupBatchNorm.track

    def track(self, means, *others):
        return right(self, means * 0.5, *others)

    with mock.patch.object(GroupBatchNorm, "track", track):
        yield


@contextlib.contextmanager
def weight_decay_forgotten() -> Iterator[None]:
    from shoal.job import Job

    right = Job.update

    def update(self):
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.0
        return right(self)

    with mock.patch.object(Job, "update", update):
        yield


@contextlib.contextmanager
def one_rank_without_a_gradient() -> Iterator[None]:
    """On rank 1 a parameter has no gradient, which the sum over ranks has left to it."""
    from shoal.job import Job

    right = Job.update

    def update(self):
        if self.groups.data.rank == 1:
            next(iter(self.replica.model.parameters())).grad = None
        return right(self)

    with mock.patch.object(Job, "update", update):
        yield


@contextlib.contextmanager
def not_a_number_on_one_rank() -> Iterator[None]:
    right = EveryStep.share

    def share(self, vector):
        if self._group.rank == 1:
            vector[0] = float("nan")
        return right(self, vector)

    with mock.patch.object(EveryStep, "share", share):
        yield


@contextlib.contextmanager
def stale_weights_on_one_rank() -> Iterator[None]:
    from shoal.job import Job

    right = Job.update

    def update(self):
        weights = [p.detach().clone() for p in self.replica.model.parameters()]
        norm = right(self)
        if self.groups.data.rank == 1:
            with torch.no_grad():
                for parameter, old in zip(self.replica.model.parameters(), weights, strict=True):
                    parameter.copy_(old)
        return norm

    with mock.patch.object(Job, "update", update):
        yield
