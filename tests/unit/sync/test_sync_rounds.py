"""When replicas meet, what travels together, who hears from whom, and bytes for numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoal.strategy import DiLoCo, Easgd, Gossip, Local, Sync
from shoal.sync import warnings_of
from shoal.sync.diloco import cut_evenly
from shoal.sync.gossip import neighbours
from shoal.sync.rounds import Rounds
from shoal.sync.sums import BLOCK, dequantise, quantise


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 12), st.integers(0, 8))
def test_each_step_is_in_one_round(every: int, total: int, after: int, offset: int) -> None:
    rounds = Rounds(every, total, after, offset % every)
    began = after
    for step in range(total):
        if step >= after:
            assert rounds.first(step) == began
            assert step - began < every
        if rounds.ends(step):
            assert step >= after
            began = step + 1
    assert began == max(total, after)  # the last step ends one, unless all are before `after`


def test_parts_meet_in_turn() -> None:
    meets = [[step for step in range(20) if Rounds(8, 20, offset=o).ends(step)] for o in (0, 4)]
    assert meets == [[7, 15, 19], [3, 11, 19]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 5))
def test_parts_are_consecutive_and_none_is_lost(sizes: list[int], parts: int) -> None:
    weights = {f"{place}": nn.Parameter(torch.zeros(size)) for place, size in enumerate(sizes)}
    found = cut_evenly(weights, parts)
    assert len(found) == parts
    assert [name for part in found for name in part] == list(weights)
    for part in found:  # a part is no larger than an even one and the tensors at its ends
        assert sum(t.numel() for t in part.values()) <= sum(sizes) / parts + max(sizes)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_who_sends_is_heard(graph: str, size: int) -> None:
    for step in range(6):
        of_each = [neighbours(graph, rank, size, step) for rank in range(size)]
        for rank, (to, sources) in enumerate(of_each):
            assert rank not in to
            assert all(rank in of_each[other][1] for other in to)
            assert all(rank in of_each[other][0] for other in sources)
            assert len(to) == (2 if graph == "ring" and size > 2 else 1)
    assert neighbours(graph, 0, 1, 3) == ([], [])


def test_an_exponential_graph_of_8_has_the_exact_mean_after_3_steps() -> None:
    values = [float(2**rank) for rank in range(8)]
    for step in range(6, 9):
        heard = [values[neighbours("exponential", rank, 8, step)[1][0]] for rank in range(8)]
        values = [(own + other) / 2 for own, other in zip(values, heard, strict=True)]
    assert values == [255 / 8] * 8


@given(st.integers(1, 700), st.floats(-30, 30))
def test_bytes_are_as_near_as_their_scale_allows(count: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(count)
    numbers = torch.randn(count, generator=generator, dtype=torch.float64) * 2.0**exponent
    whole, scales = quantise(numbers)
    assert whole.numel() == count
    assert scales.numel() == 2 * -(-count // BLOCK)
    back = dequantise(whole, scales, torch.float64)
    for block, found in zip(numbers.split(BLOCK), back.split(BLOCK), strict=True):
        # Half a step, and what bf16 may round off the scale at 127 steps.
        allowed = float(block.abs().max()) * (0.5 / 127 + 2**-8)
        assert float((block - found).abs().max()) <= allowed * (1 + 1e-9)


def test_zeros_stay_zeros() -> None:
    assert not dequantise(*quantise(torch.zeros(300)), torch.float32).any()


@pytest.mark.parametrize(
    ("way", "part"),
    [
        (Local(21), "meet once"),
        (Local(20), None),
        (Local(11, after=10), "10 steps of their own"),
        (Local(2, after=20), "as under sync"),
        (DiLoCo(32), "fewer than H=32"),
        (Easgd(21), "meet once"),
        (Gossip("ring"), None),
        (Sync(), None),
    ],
)
def test_a_run_of_20_steps_warns_of_what_hardly_happens(way: object, part: str | None) -> None:
    said = warnings_of(way, 20)  # type: ignore[arg-type]
    assert (len(said) == 1 and part in said[0]) if part else said == ()
