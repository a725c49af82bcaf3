"""What is cut and why, in words: what a run says at its start, and writes down.

of_stages(traced, boundaries, costs, table)
    ("pipeline: 2 stages, 1f1b, mb:8; of the counted time 49 % + 51 %, slowest ÷ mean 1.02",
     "stage 1, on rank 1 of the pipeline, begins with blocks.2 (net.py:14: x = self.norm(x)); …")

The first line of each kind says it in short. Lines that begin with ``warning: `` are just that.
"""

import itertools
from collections.abc import Mapping, Sequence

from shoal.parallel.randomness.graph import CountedAttention
from shoal.parallel.tensor import TensorPlan
from shoal.schedule import Table
from shoal.trace import Traced
from shoal.trace.normalise import op_name
from shoal.units import format_bytes

UNFUSED = (
    "attention that drops weights is computed outside torch's fused kernel, so that its masks do "
    "not depend on the split: more time and memory, by the square of the length"
)


def of_stages(
    traced: Traced, boundaries: Sequence[int], costs: Mapping[str, float], table: Table
) -> tuple[str, ...]:
    """The stages, their shares of the counted time, and what crosses between them."""
    if not boundaries:
        return ()
    shares = shares_of(traced, boundaries, costs)
    told = " + ".join(f"{100 * share:.0f} %" for share in shares)
    slowest = max(shares) * len(shares)
    lines = [
        f"pipeline: {table.stages} stages on {len(table.rows)} ranks, mb:{table.microbatches}; of "
        f"the counted time {told}, slowest ÷ mean {slowest:.2f}"
    ]
    crossing = traced.crossing()
    for stage, boundary in enumerate(boundaries, 1):
        node = traced.ops[boundary]
        place = f"{node.meta.get('path') or 'the model'}'s {op_name(node)}"
        line = node.meta.get("line")
        lines.append(
            f"stage {stage}, on rank {table.rank_of(stage)} of the pipeline, begins with {place}"
            f"{f' ({line})' if line else ''}; it is sent {format_bytes(crossing[boundary])} an "
            "example"
        )
    return tuple(lines)


def shares_of(
    traced: Traced, boundaries: Sequence[int], costs: Mapping[str, float]
) -> tuple[float, ...]:
    """The share of each stage of all counted time."""
    each = [costs.get(node.name, 0.0) for node in traced.ops]
    bounds = (0, *boundaries, len(each))
    sums = [sum(each[start:stop]) for start, stop in itertools.pairwise(bounds)]
    total = sum(sums)
    return tuple(one / total if total else 1 / len(sums) for one in sums)


def of_masks(traced: Traced) -> tuple[str, ...]:
    """What dropout costs that does not depend on the split."""
    return (UNFUSED,) if any(isinstance(n.target, CountedAttention) for n in traced.ops) else ()


def of_tensors(plan: TensorPlan) -> tuple[str, ...]:
    """Which tensors are cut within layers, and why the others are not."""
    short = (
        f"tensor: {len(plan.cuts)} of {len(plan.shapes)} tensors are cut over {plan.ranks} ranks, "
        f"{100 * plan.share_cut:.0f} % of all elements"
    )
    return (short, *plan.reasons, *(f"warning: {each}" for each in plan.warnings))
