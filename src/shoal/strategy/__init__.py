"""How training is split over ranks: one notation, one frozen value.

    Strategy.parse("dp2+bf16").world_size      # 2

The notation is written out in the architecture's "Strategy: one notation".
"""

from shoal.strategy.agreements import (
    Agreement,
    Async,
    DiLoCo,
    Easgd,
    Gossip,
    Local,
    Solo,
    Sync,
)
from shoal.strategy.parts import Compress, Schedule, Zero
from shoal.strategy.value import EVERY_STEP, Strategy

__all__ = [
    "EVERY_STEP",
    "Agreement",
    "Async",
    "Compress",
    "DiLoCo",
    "Easgd",
    "Gossip",
    "Local",
    "Schedule",
    "Solo",
    "Strategy",
    "Sync",
    "Zero",
]
