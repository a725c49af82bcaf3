"""The global order: a permutation, mixing, and always the same one."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data.keyed import derive_key, keyed_below, keyed_bits
from shoal.data.order import MAX_EXAMPLES, order


def whole(examples: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return order(np.arange(examples), examples=examples, seed=seed, epoch=epoch)


@settings(max_examples=200, deadline=None)
@given(
    examples=st.integers(1, 5000),
    seed=st.integers(0, 2**80),
    epoch=st.integers(0, 10_000),
)
def test_every_example_comes_exactly_once(examples: int, seed: int, epoch: int) -> None:
    assert (np.sort(whole(examples, seed, epoch)) == np.arange(examples)).all()


@pytest.mark.parametrize("examples", range(1, 130))
def test_small_sets_and_those_around_squares(examples: int) -> None:
    for epoch in range(3):
        assert sorted(whole(examples, epoch=epoch)) == list(range(examples))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_position_asked_alone_gives_what_it_gives_among_others(data: st.DataObject) -> None:
    examples = data.draw(st.integers(1, 5000))
    positions = np.array(data.draw(st.lists(st.integers(0, examples - 1), max_size=30)), dtype=int)
    expected = whole(examples, 5, 2)[positions]
    got = order(positions, examples=examples, seed=5, epoch=2)
    assert (got == expected).all()
    assert got.shape == positions.shape


def test_seeds_and_epochs_differ() -> None:
    first = whole(1000, seed=1, epoch=0)
    for other in (whole(1000, seed=2), whole(1000, seed=1, epoch=1), whole(1000, seed=1 + 2**64)):
        # Two independent orders agree in about one place of a thousand.
        assert (first == other).sum() < 10


def test_the_order_is_pinned() -> None:
    """A change of these numbers changes the batches of every recipe: it needs a new format."""
    assert whole(10).tolist() == GOLDEN_10
    assert whole(1437, seed=3, epoch=2)[:8].tolist() == GOLDEN_1437
    far = order(np.array([0, 10**12 - 1]), examples=10**12, seed=0, epoch=0)
    assert far.tolist() == GOLDEN_FAR


GOLDEN_10 = [6, 1, 9, 7, 4, 5, 2, 3, 0, 8]
GOLDEN_1437 = [583, 1247, 354, 1086, 668, 793, 626, 423]
GOLDEN_FAR = [504061573526, 429026746948]


def test_no_examples_and_one() -> None:
    assert whole(0).tolist() == []
    assert order(np.array([], dtype=int), examples=0, seed=0, epoch=0).dtype == np.int64
    assert whole(1).tolist() == [0]


def test_a_set_of_any_size_takes_no_memory() -> None:
    positions = np.random.default_rng(0).integers(0, 10**12, 1000)
    tracemalloc.start()
    examples = order(positions, examples=10**12, seed=0, epoch=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(np.unique(examples)) == len(np.unique(positions))
    assert examples.min() >= 0
    assert examples.max() < 10**12
    # Uniform: the mean of 1,000 is within 5 standard errors of the middle.
    assert abs(examples.mean() / 10**12 - 0.5) < 5 / np.sqrt(12 * 1000)


def test_the_largest_set() -> None:
    ends = np.array([0, MAX_EXAMPLES - 1])
    assert len(set(order(ends, examples=MAX_EXAMPLES, seed=0, epoch=0).tolist())) == 2


def test_a_set_sorted_by_class_gives_mixed_batches() -> None:
    labels = np.repeat(np.arange(10), 6000)
    batches = labels[whole(60_000)][: 468 * 128].reshape(-1, 128)
    counts = np.stack([(batches == label).sum(axis=1) for label in range(10)])
    # Hypergeometric: 12.8 a class and batch, variance 12.8 * 0.9 (to within 0.2 %).
    assert abs(counts.mean() - 12.8) < 0.01
    assert abs(counts.var() / (12.8 * 0.9) - 1) < 0.1


def test_neighbours_are_parted() -> None:
    places = whole(10_000).astype(float)
    steps = np.abs(np.diff(places))
    # A random permutation has about two pairs of neighbours and a mean step of N / 3.
    assert (steps == 1).sum() < 12
    assert abs(steps.mean() / (10_000 / 3) - 1) < 0.03
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), places)[0, 1]) < 0.05


@pytest.mark.parametrize("examples", [2, 3, 4, 5, 7, 12])
def test_each_example_of_a_small_set_comes_first_equally_often(examples: int) -> None:
    epochs = 800
    placed = np.stack([whole(examples, epoch=epoch) for epoch in range(epochs)])
    for place in range(examples):
        counts = np.bincount(placed[:, place], minlength=examples)
        expected = epochs / examples
        chi_square = ((counts - expected) ** 2 / expected).sum()
        # Mean examples - 1, deviation sqrt of twice that: six deviations and a little.
        assert chi_square < examples - 1 + 6 * np.sqrt(2 * (examples - 1)) + 6


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(ValueError, match="not all among the 10"):
        order(np.array([position]), examples=10, seed=0, epoch=0)


def test_too_many_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="given 46116860184273879"):
        order(np.array([0]), examples=MAX_EXAMPLES + 1, seed=0, epoch=0)


def test_keys_take_every_part_and_its_place() -> None:
    keys = {derive_key(*parts) for parts in [(0,), (0, 0), (1, 2), (2, 1), (2**64,), (2**64 + 1,)]}
    assert len(keys) == 6
    with pytest.raises(ValueError, match="must not be negative"):
        derive_key(-1)


def test_keyed_numbers_are_even_and_those_of_their_counter() -> None:
    counters = np.arange(20_000)
    numbers = keyed_below(derive_key(1), counters, 9)
    assert (keyed_below(derive_key(1), counters[[5, 3]], 9) == numbers[[5, 3]]).all()
    counts = np.bincount(numbers, minlength=9)
    assert ((counts - 20_000 / 9) ** 2 / (20_000 / 9)).sum() < 35
    bits = keyed_bits(derive_key(1), counters)
    ones = [((bits >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)]
    assert np.abs(np.array(ones) - 0.5).max() < 0.02
