"""Which sums a strategy's compression means.

sums_of(Compress("topk", 1.0), Line(group, "gradient"), {"fc.weight": weight})
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from shoal.strategy import Compress
from shoal.sync.feedback import LowRank, TopK
from shoal.sync.sums import Full, Line, Quantised, Sums


def sums_of(compress: Compress | None, line: Line, like: Mapping[str, Tensor]) -> Sums:
    """How tensors of these names and shapes are summed; nothing is compressed for None."""
    if compress is None:
        return Full(line)
    amount = compress.amount or 0.0
    match compress.method:
        case "powersgd":
            return LowRank(line, like, int(amount))
        case "topk":
            return TopK(line, like, amount)
        case "fp16":
            return Full(line, torch.float16)
        case _:
            return Full(line, torch.bfloat16)


def sums_on_wire(wire: str, line: Line) -> Sums:
    """How outer gradients are summed: ``float32`` as they are, ``bf16`` or ``int8``."""
    match wire:
        case "int8":
            return Quantised(line)
        case "bf16":
            return Full(line, torch.bfloat16)
        case _:
            return Full(line)
