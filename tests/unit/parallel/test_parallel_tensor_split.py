"""Parts of one dimension: arithmetic on integers, against the same done on a list of indices."""

import pytest

from shoal.parallel.tensor.choose import choose
from shoal.parallel.tensor.sizes import factors, taken
from shoal.parallel.tensor.split import (
    Block,
    Split,
    even_bounds,
    in_product,
    in_row,
    of_product,
    of_row,
)


def half(size: int) -> Block:
    return Block(size, even_bounds(size, 2, size))


def test_units_are_dealt_as_even_as_they_go() -> None:
    assert even_bounds(5, 2, 5) == (0, 3, 5)
    assert even_bounds(5, 3, 20) == (0, 8, 16, 20)


def test_a_row_of_equal_blocks_is_copies_of_one() -> None:
    fused = Split.made(1, (half(4), half(4), half(4)))
    assert fused == Split(3, (half(4),))
    assert fused.ranges(0) == [(0, 2), (4, 6), (8, 10)]
    assert fused.local(1) == 6


def test_ranges_that_touch_are_one() -> None:
    assert Split(1, (half(6),)).ranges(1) == [(3, 6)]
    assert Split(2, (Block(2, (0, 2, 2)), Block(2, (0, 2, 2)))).ranges(0) == [(0, 8)]


@pytest.mark.parametrize("sizes", [[5, 4], [3, 5, 4], [2, 6]])
@pytest.mark.parametrize("at", [0, 1])
def test_a_product_and_back(sizes: list[int], at: int) -> None:
    cut = Split(1, (half(sizes[at]),))
    whole = of_product(cut, at, sizes)
    assert in_product(whole, sizes) == (at, cut)


def test_what_falls_inside_a_unit_is_no_factor() -> None:
    assert in_product(Split(1, (Block(20, (0, 10, 20)),)), [5, 4]) is None


def test_a_row_and_back() -> None:
    first, second = Split(1, (half(6),)), Split(2, (half(3),))
    whole = of_row([first, second])
    assert whole is not None
    assert in_row(whole, [6, 6]) == [first, second]
    assert in_row(whole, [5, 7]) is None


def test_another_size_has_the_same_parts_or_none() -> None:
    heads = Split(1, (Block(3, (0, 2, 3)),))
    assert heads.resized(6) == Split(1, (Block(6, (0, 4, 6)),))
    assert heads.resized(6).resized(3) == heads  # type: ignore[union-attr]
    assert Split(1, (Block(6, (0, 3, 6)),)).resized(3) is None


def test_factors_of_a_reshape() -> None:
    assert factors([7, 20], [7, 5, 4]) == [7, 5, 4]
    assert taken([7, 5, 4], [7, 20]) == [[0], [1, 2]]
    assert factors([6, 4], [4, 6]) is None


def test_the_best_independent_set() -> None:
    path = {0: {1}, 1: {0, 2}, 2: {1, 3}, 3: {2}}
    assert choose({0: 3.0, 1: 4.0, 2: 3.0, 3: 1.0}, path) == {0, 2}
    assert choose({0: 3.0, 1: 9.0, 2: 3.0, 3: 1.0}, path) == {1, 3}
    assert choose({0: 0.0, 1: -1.0}, {}) == set()


def test_the_choice_equals_brute_force() -> None:
    import random

    for seed in range(30):
        dice = random.Random(seed)
        count = 9
        gains = {key: dice.random() for key in range(count)}
        pairs = [(a, b) for a in range(count) for b in range(a) if dice.random() < 0.3]
        conflicts: dict[int, set[int]] = {key: set() for key in range(count)}
        for a, b in pairs:
            conflicts[a].add(b)
            conflicts[b].add(a)
        best = 0.0
        for bits in range(1 << count):
            chosen = {key for key in range(count) if bits >> key & 1}
            if all(not (a in chosen and b in chosen) for a, b in pairs):
                best = max(best, sum(gains[key] for key in chosen))
        found = choose(gains, conflicts)
        assert all(not (conflicts[key] & found) for key in found)
        assert sum(gains[key] for key in found) == pytest.approx(best)
