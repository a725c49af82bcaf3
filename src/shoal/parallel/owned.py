"""What an owner of whole tensors keeps of a model that workers have all of.

    model      fc.weight   fc.bias   bn.running_mean      what a worker computes with: any version
    holding    fc.weight      -      bn.running_mean      this rank's, updated and saved: the newest

    replica.states = Owned(model, {"fc.weight", "bn.running_mean"})

In asynchronous SGD the two differ: the optimizer goes on while a worker computes.
"""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from shoal.layout import Part
from shoal.parallel.zero.states import norm_of, scale
from shoal.parallel.zero.twin import Twin


class Owned:
    """The states of a replica that keeps the tensors of these names, copies in host memory."""

    in_step = False

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        self._model = model
        state = model.state_dict(keep_vars=True)
        kept = {id(state[name]) for name in names}
        twin = Twin(model)

        def parameter(of: nn.Parameter) -> nn.Parameter | None:
            if id(of) not in kept:
                return None
            return nn.Parameter(_copy(of), requires_grad=of.requires_grad)

        def buffer(of: Tensor) -> Tensor | None:
            return _copy(of) if id(of) in kept else None

        twin.fill(parameter)
        twin.fill_buffers(buffer)
        self.holding = twin.root

    def layout(self, whole: dict[str, Part]) -> dict[str, Part]:
        return whole

    def finish(self) -> None:
        return

    def take_gradients(self, factor: float) -> None:
        scale(self._model, factor)

    def norm(self) -> Tensor:
        return norm_of(self._model)

    def spread(self) -> None:
        return


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.preserve_format)
