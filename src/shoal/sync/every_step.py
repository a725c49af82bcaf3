"""`sync`: gradients are summed over the replicas at each step, while the backward pass goes on.

    backward     last layer ─ … ─ … ─ first layer
    bucket 0         └─ sum ─┘
    bucket 1                └─── sum ───┘
    bucket 2                            └─ sum ─┘ exposed: nothing is left to compute meanwhile

Each rank has back-propagated its losses ÷ one number that all ranks divide by, so the *sum* is the
global gradient for any shares, empty ones included. Buckets are sent in one order on all ranks.

torch's DistributedDataParallel is not used. It regroups its buckets after the first step by the
order in which gradients arrived; gloo's ring sums an element in an order that depends on its place
in the bucket, so that on 3 ranks and more a resumed run would differ in the last bit from an
undisturbed one. With `find_unused_parameters=True` its buckets stay, at the price of a walk through
the graph and one more collective at each step (figures in LOG.md). Here buckets depend on the model
alone, and which parameters were used travels with the gradients.
"""

from collections.abc import Iterable

from torch import Tensor

from shoal.comm import Group, Pending
from shoal.errors import Refused, RunError
from shoal.strategy import Compress
from shoal.sync.agreement import Accumulation, Replica
from shoal.sync.bucket import Bucket, cut
from shoal.sync.choose import sums_of
from shoal.sync.sums import Line, Sums, UnderWay

BUCKET_BYTES = 8 << 20


class EveryStep:
    """All-reduce of gradients at each step, over `group`; `everyone` shares the step's sums."""

    def __init__(
        self, group: Group, everyone: Group, compress: Compress | None = None, place: int = 0
    ) -> None:
        self._group = group
        self._everyone = everyone
        self._compress = compress
        self._line = Line(group, "gradient", group.rank, place)
        self._sums: Sums | None = None  # where what is sent is made smaller
        self._names: dict[int, str] = {}
        self._buckets: list[Bucket] = []
        self._bucket_of: dict[int, Bucket] = {}
        self._accumulation: Accumulation | None = None
        self._sent = 0
        self._last = False  # whether the backward pass in hand is the step's last
        self.hidden_s = 0.0

    def attach(self, replica: Replica) -> None:
        trained = [p for p in replica.model.parameters() if p.requires_grad]
        self._accumulation = getattr(replica, "accumulation", None)
        if self._accumulation is not None:
            self._accumulation.tell(self._completed)  # which stands for a whole model, not a stage
        elif not trained:
            raise Refused(
                "every parameter of this model is frozen (requires_grad is False): "
                "there is nothing to train",
                hint="Unfreeze at least one parameter.",
            )
        self._buckets = cut(reversed(trained), BUCKET_BYTES)
        if self._compress is not None:
            named = {n: p for n, p in replica.model.named_parameters() if p.requires_grad}
            self._names = {id(parameter): name for name, parameter in named.items()}
            self._sums = sums_of(self._compress, self._line, named)
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                self._bucket_of[id(parameter)] = bucket
                parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]

    def _arrived(self, parameter: Tensor) -> None:
        """Something was added to a parameter's gradient: send what has become full, in order.

        Microbatches add to it one after another; before the last one nothing is sent.
        """
        bucket = self._bucket_of[id(parameter)]
        if bucket.pending is not None:
            raise RunError(
                f"the gradient of a parameter of shape {list(parameter.shape)} was added to twice "
                "in one backward pass",
                hint="A reentrant checkpoint does that: call torch.utils.checkpoint with "
                "use_reentrant=False.",
                phase="backward",
            )
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise Refused(
                f"a parameter of shape {list(parameter.shape)} has a sparse gradient, and replicas "
                "sum dense ones",
                hint="Make the embedding with sparse=False.",
            )
        bucket.arrived.add(id(parameter))
        if self._last if self._accumulation is None else self._accumulation.finishes(parameter):
            bucket.complete.add(id(parameter))
            self._send_full()

    def _completed(self, parameters: Iterable[Tensor]) -> None:
        """Nothing is added to these parameters' gradients any more, if they have any."""
        for parameter in parameters:
            bucket = self._bucket_of.get(id(parameter))
            if bucket is not None and bucket.pending is None and parameter.grad is not None:
                bucket.arrived.add(id(parameter))
                bucket.complete.add(id(parameter))
        self._send_full()

    def _send_full(self) -> None:
        while self._sent < len(self._buckets) and self._buckets[self._sent].is_full:
            self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[self._sent]
        bucket.fill()
        bucket.pending = self._sum(bucket)
        self._sent += 1

    def _sum(self, bucket: Bucket) -> "Pending | _Smaller":
        used = len(bucket.parameters)
        if self._sums is None:
            return self._group.all_reduce_later(bucket.flat, "gradient", agreement=used)
        counts = self._group.all_reduce_later(bucket.used, "agreement")
        named = {self._names[id(p)]: view for p, view in bucket.gradients()}
        arrived = {self._names[each] for each in bucket.arrived}
        return _Smaller(self._sums.start(named, arrived), counts)

    def state(self) -> dict[str, Tensor]:
        """What was left out of earlier sums, by ``name/key``: of this rank, for a checkpoint."""
        return {} if self._sums is None else self._sums.state()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from :meth:`state`."""
        if self._sums is not None:
            self._sums.restore(tensors)

    def share(self, vector: Tensor) -> Pending:
        self._last = True
        return self._everyone.all_reduce_later(vector, "metric").on_host()

    def agree(self, replica: Replica) -> None:
        """Send what is left (parameters that the step did not use), and wait for the sums."""
        while self._sent < len(self._buckets):
            self._send_next()
        waited, under_way = self._group.counter.waited_s, 0.0
        last_end = 0.0
        for bucket in self._buckets:
            pending = bucket.pending
            assert pending is not None  # all have been sent
            pending.wait()
            ended = pending.ended or pending.began
            under_way += max(0.0, ended - max(pending.began, last_end))
            last_end = max(last_end, ended)
            bucket.settle()
        self._sent = 0
        self._last = False
        waited = self._group.counter.waited_s - waited
        self.hidden_s += max(0.0, under_way - waited)


class _Smaller:
    """A bucket whose gradients travel compressed, and beside them which were used."""

    def __init__(self, gradients: UnderWay, counts: Pending) -> None:
        self._gradients, self._counts = gradients, counts
        self.began, self.ended = gradients.began, gradients.ended

    def wait(self) -> None:
        self._gradients.wait()
        self._counts.wait()
        self.ended = self._gradients.ended
