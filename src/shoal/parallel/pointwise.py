"""Convolutions of single positions as matrix products, where the processor does those faster.

    images [n, C, H, W] in channels_last  =  rows [n·H·W, C] in memory        y = x · weightᵀ

oneDNN brings the weights of each convolution into a layout of its own, forward and backward, which
costs more than the arithmetic on the small maps deep in a network. One core with AVX512-BF16,
forward and backward, convolution and product in ms:

    channels, map, images          bf16            float32
    1024 → 256,   4×4,   16      2.7    2.2      6.8    4.4
     512 → 2048,  2×2,   16      5.9    2.9     13.3    5.4
      64 → 256,  14×14,  16      1.8    1.7      3.1    4.0
      64 → 256,  56×56,  32       56     84      166    176

    use_products(model)      # how many layers may take this way; each call chooses by its rows
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from shoal.parallel.specialise import specialise

# float64 as float32: that is what `verify` computes in.
MOST_ROWS = {torch.bfloat16: 4096, torch.float32: 256, torch.float64: 256}


class PointwiseConv(nn.Conv2d):
    """A 1×1 convolution; all else is the original layer's."""

    def forward(self, input: Tensor) -> Tensor:
        """[n, C, H, W] to [n, K, ceil(H/stride), ceil(W/stride)]."""
        if not self._fits(input):
            return super().forward(input)
        down, right = self.stride
        rows = input.permute(0, 2, 3, 1)[:, ::down, ::right]
        return functional.linear(rows, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

    def _fits(self, input: Tensor) -> bool:
        if input.dim() != 4 or not input.is_contiguous(memory_format=torch.channels_last):
            return False
        images, _, height, width = input.shape
        rows = images * -(-height // int(self.stride[0])) * -(-width // int(self.stride[1]))
        bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        return 0 < rows <= MOST_ROWS.get(bf16 or input.dtype, 0)


def use_products(model: nn.Module) -> int:
    """Let every plain 1×1 convolution of `model` be a product where it is faster; how many."""
    found = 0
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and _is_pointwise(layer):
            specialise(layer, PointwiseConv)
            found += 1
    return found


def _is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether it is one of torch's own, of single positions, all channels with all."""
    own = type(layer).forward is nn.Conv2d.forward
    padded = layer.padding not in ((0, 0), "valid")
    return own and layer.kernel_size == (1, 1) and layer.groups == 1 and not padded
