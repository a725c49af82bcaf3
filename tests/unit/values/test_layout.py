import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.layout import Part, Slice, check_cover, layout_from_json, layout_to_json

unhurried = settings(deadline=None)  # a busy machine is no failure

shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def boxes(draw: Any, shape: tuple[int, ...] | None = None) -> Slice:
    sizes = draw(shapes) if shape is None else shape
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in sizes]
    return Slice(sizes, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@st.composite
def pairs(draw: Any) -> tuple[Slice, Slice]:
    shape = draw(shapes)
    return draw(boxes(shape)), draw(boxes(shape))


@st.composite
def grids(draw: Any) -> list[Slice]:
    """A tensor cut along every axis at random places: an exact cover."""
    shape = draw(st.lists(st.integers(1, 6), max_size=3).map(tuple))
    cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))}) for n in shape]
    ranges = itertools.product(*(itertools.pairwise(c) for c in cuts))
    pieces = [Slice(shape, tuple(a for a, _ in r), tuple(b - a for a, b in r)) for r in ranges]
    return draw(st.permutations(pieces))


def indices(box: Slice) -> set[tuple[int, ...]]:
    ranges = (range(a, b) for a, b in zip(box.offset, box.stop, strict=True))
    return set(itertools.product(*ranges))


@unhurried
@given(boxes())
def test_json_round_trip(box: Slice) -> None:
    assert Slice.from_json(json.loads(json.dumps(box.to_json()))) == box
    layout = {"layer.weight": Part.of(box)}
    assert layout_from_json(json.loads(json.dumps(layout_to_json(layout)))) == layout


@unhurried
@given(pairs())
def test_intersection_holds_exactly_the_elements_of_both(pair: tuple[Slice, Slice]) -> None:
    first, second = pair
    both = first.intersection(second)
    expected = indices(first) & indices(second)
    assert (indices(both) if both else set()) == expected
    assert second.intersection(first) == both


@unhurried
@given(pairs())
def test_index_within_reads_the_same_numbers_as_the_whole(pair: tuple[Slice, Slice]) -> None:
    outer, other = pair
    inner = outer.intersection(other)
    whole = np.arange(math.prod(outer.global_shape)).reshape(outer.global_shape)
    if inner is None:
        return
    everything = Slice.whole(outer.global_shape)
    held = whole[outer.index_within(everything)]
    expected = whole[inner.index_within(everything)]
    np.testing.assert_array_equal(held[inner.index_within(outer)], expected)


@unhurried
@given(grids())
def test_a_grid_covers(pieces: list[Slice]) -> None:
    check_cover(pieces)
    check_cover([*pieces, pieces[0]])


@unhurried
@given(grids(), st.data())
def test_a_hole_is_found(pieces: list[Slice], data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from(pieces))
    rest = [piece for piece in pieces if piece != lost]
    with pytest.raises(ValueError, match=r"in no slice|no slice at all"):
        check_cover(rest)


@unhurried
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), st.data())
def test_check_cover_agrees_with_counting(shape: tuple[int, ...], data: st.DataObject) -> None:
    pieces = data.draw(st.lists(boxes(shape), min_size=1, max_size=5))
    counts = np.zeros(shape, int)
    for piece in set(pieces):
        counts[piece.index_within(Slice.whole(shape))] += 1
    if (counts == 1).all():
        check_cover(pieces)
    else:
        with pytest.raises(ValueError, match=r"overlap|in no slice"):
            check_cover(pieces)


def test_overlap_names_both() -> None:
    with pytest.raises(ValueError, match=r"\[0:3\] of \(4,\) and \[2:4\] of \(4,\) overlap"):
        check_cover([Slice((4,), (0,), (3,)), Slice((4,), (2,), (2,))])


def test_many_shards_are_checked_in_linear_time() -> None:
    for axis in (0, 1):
        shape = tuple(5_000 if a == axis else 2 for a in (0, 1))
        pieces = [
            Slice(
                shape,
                tuple(i if a == axis else 0 for a in (0, 1)),
                tuple(1 if a == axis else 2 for a in (0, 1)),
            )
            for i in range(5_000)
        ]
        check_cover(pieces)


def test_scalars_and_empty_tensors() -> None:
    check_cover([Slice.whole(())])
    check_cover([Slice.whole((0, 3))])
    check_cover([Slice.whole((2,)), Slice((2,), (2,), (0,))])
    assert Slice.whole(()).intersection(Slice.whole(())) == Slice.whole(())


@pytest.mark.parametrize(
    ("shape", "offset", "size", "message"),
    [
        ((4,), (2,), (3,), "2:5 reaches out of dimension 0, which has 4"),
        ((4,), (-1,), (2,), "offset must not be negative"),
        ((4,), (0, 0), (2,), "one number for each dimension"),
        ((4.0,), (0,), (2,), "global_shape must be whole numbers"),
    ],
)
def test_impossible_slices(shape: Any, offset: Any, size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Slice(shape, offset, size)


def test_slices_of_different_tensors_do_not_mix() -> None:
    with pytest.raises(ValueError, match="different shapes"):
        Slice.whole((2,)).intersection(Slice.whole((3,)))
    with pytest.raises(ValueError, match="different shapes"):
        check_cover([Slice.whole((2,)), Slice.whole((3,))])
    with pytest.raises(ValueError, match="is not inside"):
        Slice.whole((4,)).index_within(Slice((4,), (1,), (2,)))
    with pytest.raises(ValueError, match=r"fc: a slice needs"):
        layout_from_json({"fc": {"boxes": [{"offset": [0], "shape": [1]}], "dim": 0}})


def test_a_part_of_several_boxes_is_taken_narrowed_and_placed() -> None:
    import torch

    whole = torch.arange(24).view(6, 4)
    part = Part.of(Slice((6, 4), (0, 0), (1, 4)), Slice((6, 4), (3, 0), (2, 4)))
    assert part.shape == (3, 4)
    assert not part.is_whole
    held = part.take(whole)
    assert torch.equal(held, whole[[0, 3, 4]])
    assert all(
        torch.equal(held[index], whole[box.index_within(Slice.whole((6, 4)))])
        for box, index in part.places()
    )
    assert torch.equal(part.narrow(0, 1, 3).take(whole), held[1:3])
    assert torch.equal(part.narrow(0, 0, 2).take(whole), held[:2])
    assert torch.equal(part.narrow(1, 1, 3).take(whole), held[:, 1:3])
    assert part.narrow(0, 2, 2).shape == (0, 4)
    assert Part.from_json(json.loads(json.dumps(part.to_json()))) == part


def test_boxes_that_overlap_or_do_not_fit_are_no_part() -> None:
    with pytest.raises(ValueError, match="overlap"):
        Part.of(Slice((6,), (0,), (3,)), Slice((6,), (2,), (2,)))
    with pytest.raises(ValueError, match="side by side"):
        Part.of(Slice((6, 4), (0, 0), (1, 4)), Slice((6, 4), (1, 0), (1, 3)))
    with pytest.raises(ValueError, match="one box"):
        Part(())
