"""Weight matching: the order of units in which one network's weights are nearest to another's.

    maximise  Σ over tensors  ⟨A, P B⟩          one permutation a space, all others held:
    a space   M[i, j] = Σ over its axes ⟨unit i of A, unit j of B⟩      a linear assignment

    aligned = match(reference, other, spaces, parameters)        # other, its units in A's order

Spaces are taken in the order of the computation, again and again, until none gains anything: the
first is anchored by the inputs, whose places are fixed. Git Re-Basin: Ainsworth, Hayase and
Srinivasa 2023 (arXiv 2209.04836), section 3.2 and algorithm 1, which takes them in random order.
Everything that follows a unit moves with it, running statistics included; only parameters decide.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from shoal.predict.permutations import Axis, Space, State, permute

MAX_PASSES = 100  # of coordinate descent; networks of this kind settle in fewer than ten
_GAIN = 1e-12  # of the whole, under which an assignment is no better


def match(
    reference: State, other: State, spaces: Sequence[Space], parameters: Collection[str]
) -> dict[str, Tensor]:
    """The state `other` with its units in the order in which it is nearest to `reference`."""
    aligned = dict(other)
    for _ in range(MAX_PASSES):
        moved = False
        for space in spaces:
            likeness = _likeness(reference, aligned, space, parameters)
            order, gain = _best_order(likeness)
            if gain > _GAIN * float(likeness.abs().sum()):
                aligned, moved = permute(aligned, space, order), True
        if not moved:
            break
    return aligned


def _likeness(reference: State, other: State, space: Space, parameters: Collection[str]) -> Tensor:
    """M: [units, units], float64."""
    total = torch.zeros(space.units, space.units, dtype=torch.float64)
    for axis in space.axes:
        if axis.name in parameters:
            one, two = _units(reference, axis, space), _units(other, axis, space)
            total += one @ two.T
    return total


def _units(state: State, axis: Axis, space: Space) -> Tensor:
    """A row for each unit."""
    tensor = state[axis.name].detach().cpu().double().movedim(axis.dim, 0)
    return tensor.reshape(space.units, -1)


def _best_order(likeness: Tensor) -> tuple[Tensor, float]:
    """For each place the unit to put there, and what that gains over leaving all in place."""
    # Half a second of import, which no other way to merge needs.
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(likeness.numpy(), maximize=True)
    order = torch.as_tensor(columns)
    gained = likeness.gather(1, order.unsqueeze(1)).sum() - likeness.diagonal().sum()
    return order, float(gained)
