"""Where a traced model is cut: balanced by counted costs, or where its parameters lie already.

    boundaries = choose(traced, 4, traced.costs)
    cut = cut_at(traced, boundaries, blocks=("layers.0", "layers.1"))
    follow(traced_for_evaluation, cut, holders, names)       # boundaries of the same stages

Within a stage there are further borders around each block that is computed again in the backward
pass.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from shoal.errors import Refused
from shoal.planner.partition import partition
from shoal.trace import Segment, Traced
from shoal.trace.normalise import op_name
from shoal.trace.segments import free_values

BYTES_PER_S = 1e9  # of gloo over loopback, measured

Place = tuple[str, str, int]  # path, kind of operation, number of the call


@dataclass(frozen=True)
class Cut:
    """The segments of each stage, whether they are computed again, and where operations are."""

    stages: list[list[Segment]]
    again: list[list[bool]]
    stage_of: dict[Place, int]


def choose(traced: Traced, stages: int, costs: Mapping[str, float]) -> tuple[int, ...]:
    """The boundaries whose slowest stage is fastest. Raises `Refused` if there are too few.

    ``costs``: seconds of each operation, by name, as they were before the graph was rewritten.
    """
    ops = traced.ops
    # Values go one way, and their gradients the other.
    crossing = [2 * traced.rows * each / BYTES_PER_S for each in traced.crossing()]
    allowed = set(range(1, len(ops))) - traced.forbidden - _empty_ends(traced)
    return partition([costs.get(node.name, 0.0) for node in ops], crossing, stages, allowed)


def _empty_ends(traced: Traced) -> set[int]:
    """Boundaries before which, or after which, there are only values computed everywhere."""
    free = _free(traced)
    real = [index for index, node in enumerate(traced.ops) if node not in free]
    if not real:
        return set(range(len(traced.ops)))
    return {*range(real[0] + 1), *range(real[-1] + 1, len(traced.ops) + 1)}


def _free(traced: Traced) -> set[Node]:
    fixed = {name for name, path in traced.state.items() if path in traced.parameters}
    return free_values(traced.graph, fixed)


def cut_at(traced: Traced, boundaries: Sequence[int], blocks: Sequence[str] = ()) -> Cut:
    """Cut into stages, and those at the borders of blocks."""
    borders = _block_borders(traced, blocks) if blocks else set()
    everywhere = sorted({*boundaries, *borders})
    segments = traced.segment(everywhere)
    stages: list[list[Segment]] = [[] for _ in range(len(boundaries) + 1)]
    again: list[list[bool]] = [[] for _ in stages]
    for start, segment in zip((0, *everywhere), segments, strict=True):
        stage = sum(boundary <= start for boundary in boundaries)
        stages[stage].append(segment)
        own = set(segment.nodes)
        inside = (_block(n, blocks) for n in segment.graph.nodes if n.name in own)
        again[stage].append(any(block is not None for block in inside))
    stage_of = {
        _place(node): sum(boundary <= index for boundary in boundaries)
        for index, node in enumerate(traced.ops)
    }
    return Cut(stages, again, stage_of)


def _place(node: Node) -> Place:
    return str(node.meta.get("path", "")), op_name(node), int(node.meta.get("call", 0))


def _block_borders(traced: Traced, blocks: Sequence[str]) -> set[int]:
    """Boundaries around each block, where a cut is allowed."""
    not_allowed = traced.forbidden | _empty_ends(traced)
    inside = [_block(node, blocks) for node in traced.ops]
    return {
        index
        for index, (before, here) in enumerate(itertools.pairwise(inside), 1)
        if before != here and index not in not_allowed
    }


def _block(node: Node, blocks: Sequence[str]) -> str | None:
    path = str(node.meta.get("path", ""))
    return next((b for b in blocks if path == b or path.startswith(f"{b}.")), None)


def follow(
    traced: Traced, first: Cut, holders: Mapping[str, set[int]], names: Mapping[str, str]
) -> list[int]:
    """Boundaries of another trace of the model such that each stage finds its parameters.

    Raises `Refused` where it uses them in another order.
    """
    stages = len(first.stages)
    bounds = _bounds(traced, holders, names, stages)
    near = [first.stage_of.get(_place(node)) for node in traced.ops]
    not_allowed = traced.forbidden | _empty_ends(traced)
    found: list[int] = []
    for stage, (lowest, highest) in enumerate(bounds, 1):
        least = max(lowest, found[-1] + 1 if found else 1)
        wanted = next((i for i, at in enumerate(near) if at is not None and at >= stage), highest)
        possible = [b for b in range(least, highest + 1) if b not in not_allowed]
        if not possible:
            raise Refused(
                "in evaluation the model uses its parameters in another order than in training, "
                f"or cannot be cut between stages {stage - 1} and {stage} there",
                hint="Use another number of stages, or a strategy without pp.",
            )
        found.append(min(possible, key=lambda boundary: abs(boundary - wanted)))
    return found


def _bounds(
    traced: Traced, holders: Mapping[str, set[int]], names: Mapping[str, str], stages: int
) -> list[tuple[int, int]]:
    """For each boundary, after which operation it must lie, and before which."""
    needs: list[int | None] = []
    for node in traced.ops:
        held = [holders[names[traced.state[n.name]]] for n in node.all_input_nodes
                if traced.state.get(n.name) in traced.parameters]  # fmt: skip
        single = [next(iter(each)) for each in held if len(each) == 1]
        needs.append(single[0] if single else None)
    last = len(needs) - 1
    bounds = []
    for stage in range(1, stages):
        before = [i for i, need in enumerate(needs) if need is not None and need < stage]
        after = [i for i, need in enumerate(needs) if need is not None and need >= stage]
        bounds.append((max(before, default=0) + 1, min(after, default=last)))
    return bounds
