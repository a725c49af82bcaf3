"""`sync`: gradients are summed over the replicas at each step, while the backward pass goes on.

torch's DistributedDataParallel does the work, with three settings that matter:

- A communication hook *sums*. DDP's default averages, which is right only for equal shares; here
  each rank has back-propagated its losses ÷ the global count, so the sum is the global gradient for
  any shares, empty ones included.
- ``find_unused_parameters=True``. Without it DDP regroups its buckets by the order in which the
  first step's gradients arrived; gloo's ring sums an element in an order that depends on its place
  in the bucket, so a resumed run would differ in the last bit from an undisturbed one on 3 ranks
  and more. With it the buckets stay as they were made, and parameters that a step does not use are
  handled as on one device. Its cost is in LOG.md.
- Buffers are not DDP's business: batch statistics are equal on all replicas by construction.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from shoal.comm import Group
from shoal.errors import Refused
from shoal.sync.agreement import Replica


class _WithUnused(nn.Module):
    """The replica's body, beside a parameter of no elements that is never used.

    DDP warns in each process that looks for unused parameters and finds none; that comes from C++,
    where neither `warnings` nor, once torch is imported, a variable reaches it.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        device = next(body.parameters()).device
        self.body = body
        self.unused = nn.Parameter(torch.empty(0, device=device))

    def forward(self, *inputs: Any) -> Any:
        return self.body(*inputs)


class EveryStep:
    """All-reduce of gradients at each step, over `group`."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._map_bytes = 0

    def attach(self, replica: Replica) -> None:
        if not any(parameter.requires_grad for parameter in replica.model.parameters()):
            raise Refused(
                "every parameter of this model is frozen (requires_grad is False): "
                "there is nothing to train",
                hint="Unfreeze at least one parameter.",
            )
        replica.wrap(self._wrapped)

    def _wrapped(self, body: nn.Module) -> nn.Module:
        module = _WithUnused(body)
        # All buffers are ignored, rather than `broadcast_buffers=False`: torch 2.13 deprecates the
        # latter, and its successor would still broadcast them once.
        buffers = [name for name, _ in module.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
            module, buffers
        )
        wrapped = DistributedDataParallel(
            module,
            process_group=self._group.process_group,
            init_sync=False,  # initial weights are equal: start-up compares their digests
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
        wrapped.register_comm_hook(None, self._sum)
        # With each backward pass DDP sums a map of which parameters were used, an int32 for each.
        self._map_bytes = 4 * sum(p.requires_grad for p in module.parameters())
        return wrapped

    def _sum(self, _state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        return self._group.all_reduce_future(bucket.buffer(), "gradient")

    def share(self, vector: Tensor) -> Tensor:
        return self._group.all_reduce(vector, "metric")

    def agree(self, replica: Replica) -> None:
        """Nothing is left to do: the backward pass has waited for the sums."""
        self._group.counter.add("all_reduce", "agreement", self._map_bytes)
