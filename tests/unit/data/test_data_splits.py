"""What is held out: a fixed tenth that keeps the proportions of the classes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.splits import held_out, tenth


@pytest.mark.parametrize(
    ("examples", "expected"), [(0, 0), (1, 0), (2, 1), (14, 1), (15, 2), (100, 10), (1797, 180)]
)
def test_a_tenth_is_rounded_and_one_at_least(examples: int, expected: int) -> None:
    assert tenth(examples) == expected


@settings(max_examples=200, deadline=None)
@given(labels=st.lists(st.integers(0, 6), max_size=300), share=st.floats(0, 1))
def test_as_many_as_asked_for_in_the_classes_proportions(labels: list[int], share: float) -> None:
    array = np.array(labels, dtype=np.int64)
    count = int(share * len(labels))
    held = held_out(array, count)
    assert held.sum() == count
    for label in set(labels):
        exact = (array == label).sum() * count / len(labels)
        assert abs(held[array == label].sum() - exact) < 1


def test_the_choice_is_mixed_and_pinned() -> None:
    held = np.flatnonzero(held_out(np.zeros(1000, dtype=int), 100))
    assert held[:10].tolist() == GOLDEN
    # Not a stretch, and not every tenth: the gaps of a random choice.
    assert 0 < (np.diff(held) == 1).sum() < 25
    assert np.diff(held).max() > 25


GOLDEN = [33, 35, 36, 37, 43, 47, 75, 77, 81, 82]
