"""From an `nn.Module` to a graph of plain operations that can be rewritten, and cut.

traced = trace(model, inputs, rows=4)
segments = traced.segment(boundaries)
"""

from shoal.trace.blocks import Block, Blocks
from shoal.trace.segments import Segment
from shoal.trace.traced import Traced, trace, trace_blocks

__all__ = ["Block", "Blocks", "Segment", "Traced", "trace", "trace_blocks"]
