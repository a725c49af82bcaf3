"""A model of which one rank is so many times slower than the others, for `agreements.py`.

    model: {name: "slowed:resnet", width: 16, times: 4}

In training the slow rank sleeps in each forward pass for what the other passes of a machine so much
slower would take: a backward pass counts as two forward ones.
"""

import time
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

SLOW_RANK = 1
PASSES = 3  # a forward and a backward pass, in forward passes


class Slowed(nn.Module):
    """The model, whose forward pass takes `times` as long on the slow rank, its backward's too."""

    def __init__(self, model: nn.Module, times: float) -> None:
        super().__init__()
        self.model, self._times = model, times

    def forward(self, inputs: Tensor) -> Tensor:
        began = time.perf_counter()
        outputs: Tensor = self.model(inputs)
        slow = self.training and dist.is_initialized() and dist.get_rank() == SLOW_RANK
        if slow and self._times > 1:
            time.sleep((self._times - 1) * PASSES * (time.perf_counter() - began))
        return outputs


def resnet(times: float = 1.0, width: int = 16, classes: int = 10, in_channels: int = 1) -> Any:
    """A ResNet-18 for small images, with group norm."""
    from shoal.models import ResNet, ResNetOptions

    shape = {"width": width, "classes": classes, "in_channels": in_channels}
    return Slowed(ResNet(ResNetOptions(18, stem="small", norm="group", **shape)), times)
