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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shoal.comm import Group
from shoal.errors import Refused
from shoal.sync.agreement import Replica


class EveryStep:
    """All-reduce of gradients at each step, over `group`."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def attach(self, replica: Replica) -> None:
        if not any(parameter.requires_grad for parameter in replica.model.parameters()):
            raise Refused(
                "every parameter of this model is frozen (requires_grad is False): "
                "there is nothing to train",
                hint="Unfreeze at least one parameter.",
            )
        replica.wrap(self._wrapped)

    def _wrapped(self, body: nn.Module) -> nn.Module:
        # All buffers are ignored, rather than `broadcast_buffers=False`: torch 2.13 deprecates the
        # latter, and its successor would still broadcast them once.
        buffers = [name for name, _ in body.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(body, buffers)
        wrapped = DistributedDataParallel(
            body,
            process_group=self._group.process_group,
            init_sync=False,  # initial weights are equal: start-up compares their digests
            find_unused_parameters=True,
            gradient_as_bucket_view=True,
        )
        wrapped.register_comm_hook(None, self._sum)
        return wrapped

    def _sum(self, _state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        return self._group.all_reduce_future(bucket.buffer(), "gradient")

    def share(self, vector: Tensor) -> Tensor:
        return self._group.all_reduce(vector, "metric")

    def agree(self, replica: Replica) -> None:
        """Nothing is left to do: the backward pass has waited for the sums."""
