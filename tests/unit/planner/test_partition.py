"""The dynamic programme's cut is that of brute force."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import Refused
from shoal.planner.partition import partition, stage_costs


def by_hand(
    costs: Sequence[int], crossing: Sequence[int], boundaries: Sequence[int]
) -> tuple[int, int]:
    """(slowest stage, bytes that cross), written out."""
    ends = [0, *boundaries, len(costs)]
    stages = []
    for number, (start, stop) in enumerate(itertools.pairwise(ends)):
        received = crossing[start] if number else 0
        sent = crossing[stop] if number < len(ends) - 2 else 0
        stages.append(sum(costs[start:stop]) + received + sent)
    return max(stages), sum(crossing[b] for b in boundaries)


@given(data=st.data(), nodes=st.integers(1, 9), stages=st.integers(1, 5))
def test_as_good_as_brute_force(data: st.DataObject, nodes: int, stages: int) -> None:
    costs = data.draw(st.lists(st.integers(0, 9), min_size=nodes, max_size=nodes))
    crossing = data.draw(st.lists(st.integers(0, 5), min_size=nodes + 1, max_size=nodes + 1))
    allowed = data.draw(st.sets(st.integers(1, max(1, nodes - 1))))
    possible = sorted(cut for cut in allowed if cut < nodes)
    if len(possible) < stages - 1:
        with pytest.raises(Refused):
            partition(costs, crossing, stages, allowed)
        return
    best = min(
        by_hand(costs, crossing, cuts) for cuts in itertools.combinations(possible, stages - 1)
    )
    found = partition(costs, crossing, stages, allowed)
    assert len(found) == stages - 1
    assert set(found) <= set(possible)
    assert by_hand(costs, crossing, found) == best
    assert max(stage_costs(costs, crossing, found)) == best[0]


def test_cheap_cuts_win_ties_only() -> None:
    # 3 | 3 whatever crosses; of two cuts in the same place of the sums, the one where less does.
    assert partition([3, 0, 3], [0, 0.1, 0, 0], 2, range(1, 3)) == (2,)
    assert partition([1, 1, 1, 1], [0, 0, 0.5, 0, 0], 2, range(1, 4)) == (2,)


def test_a_long_chain_is_cut_exactly() -> None:
    costs = [float(n % 7 + 1) for n in range(700)]
    found = partition(costs, [0.0] * 701, 10, range(1, 700))
    assert max(stage_costs(costs, [0.0] * 701, found)) == sum(costs) / 10


def test_more_stages_than_cuts_are_refused_with_the_nearest_that_works() -> None:
    with pytest.raises(Refused, match="4 stages needs 3 cuts, and the model has 2") as refused:
        partition([1, 1, 1], [0, 0, 0, 0], 4, [0, 1, 2, 3])
    assert "3 stages" in str(refused.value.hint)
    with pytest.raises(ValueError, match="one more is needed"):
        partition([1, 1], [0, 0], 1, [1])
