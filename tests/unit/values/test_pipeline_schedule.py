"""Pipeline schedules: complete, free of deadlock, the order of torch's own, and their bubbles."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import Refused
from shoal.schedule import METHODS, Action, Table, make

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

WITH_CHUNKS = [
    (method, chunks)
    for method, choices in {
        "gpipe": (1,), "1f1b": (1,), "interleaved": (1, 2, 3), "zb": (1, 2, 3), "zbv": (2,)
    }.items()
    for chunks in choices
]  # fmt: skip


@pytest.mark.parametrize(("method", "chunks"), WITH_CHUNKS)
def test_complete_and_free_of_deadlock_for_any_numbers(method: str, chunks: int) -> None:
    for ranks, microbatches in itertools.product(range(1, 9), range(1, 20)):
        make(method, ranks, microbatches, chunks).validate()


# ---- the order of torch's schedules


class Recorder:
    """A stage of torch's that notes what its schedule has it do. (Their descriptions of the orders
    are wrong for 1F1B in torch 2.13: the last rank's forwards begin with the second.)
    """

    def __init__(self, index: int) -> None:
        self.stage_index = index
        self.actions: list[Action] = []

    def forward_one_chunk(self, microbatch: int, *_: Any, **__: Any) -> None:
        self.actions.append(Action("F", self.stage_index, microbatch))

    def backward_one_chunk(self, microbatch: int, **_: Any) -> None:
        self.actions.append(Action("B", self.stage_index, microbatch))

    def __getattr__(self, name: str) -> Any:
        assert name in {
            "get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops",
            "perform_reduce_grad",
        }  # fmt: skip
        return lambda _microbatch: []


def single_stage(kind: str, ranks: int, microbatches: int) -> tuple[tuple[Action, ...], ...]:
    rows = []
    for rank in range(ranks):
        schedule = object.__new__(getattr(schedules, kind))
        schedule._num_stages, schedule._n_microbatches = ranks, microbatches
        schedule._stage = stage = Recorder(rank)
        schedule._loss_fn = schedule.scale_grads = None
        schedule._has_backward, schedule._stage_forward_initialized = True, True
        schedule._check_inputs = lambda *_: ([()] * microbatches, [{}] * microbatches)
        schedule._initialize_stage = lambda *_: None
        schedule._maybe_compute_loss = schedule._maybe_get_loss = lambda *_: None
        schedule._update_losses = lambda *_: None
        schedule._step_microbatches()
        rows.append(tuple(stage.actions))
    return tuple(rows)


def multi_stage(kind: str, ranks: int, microbatches: int, chunks: int) -> list[list[Any]]:
    schedule = object.__new__(getattr(schedules, kind))
    schedule._stages = [SimpleNamespace() for _ in range(chunks)]
    schedule.pp_group_size, schedule._n_microbatches = ranks, microbatches
    schedule.n_local_stages, schedule.num_stages = chunks, ranks * chunks
    schedule.number_of_rounds = max(1, microbatches // ranks)
    schedule.microbatches_per_round = microbatches // schedule.number_of_rounds
    return [schedule._calculate_single_rank_operations(rank) for rank in range(ranks)]


def in_our_words(rows: list[list[Any]]) -> tuple[tuple[Action, ...], ...]:
    names = {"F": "F", "B": "B", "I": "I", "W": "W"}
    return tuple(
        tuple(
            Action(names[a.computation_type.value], a.stage_index, a.microbatch_index)  # type: ignore[arg-type]
            for a in row
            if a is not None and a.computation_type.value in names
        )
        for row in rows
    )


@pytest.mark.parametrize("ranks", range(1, 7))
@pytest.mark.parametrize("microbatches", [1, 3, 4, 6, 8, 9, 16])
def test_gpipe_and_1f1b_have_torchs_order(ranks: int, microbatches: int) -> None:
    for ours, theirs in (("gpipe", "ScheduleGPipe"), ("1f1b", "Schedule1F1B")):
        assert make(ours, ranks, microbatches).rows == single_stage(theirs, ranks, microbatches)


@pytest.mark.parametrize(
    ("ranks", "microbatches"),
    [
        (ranks, microbatches)
        for ranks in range(1, 6)
        for microbatches in (1, 2, 3, 4, 5, 8, 10, 12, 15, 16)
        if microbatches % max(1, microbatches // ranks) == 0  # torch refuses uneven rounds
    ],
)
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_interleaved_schedules_have_torchs_order(
    ranks: int, chunks: int, microbatches: int
) -> None:
    for ours, theirs in (
        ("interleaved", "ScheduleInterleaved1F1B"),
        ("zb", "ScheduleInterleavedZeroBubble"),
    ):
        expected = in_our_words(multi_stage(theirs, ranks, microbatches, chunks))
        assert make(ours, ranks, microbatches, chunks).rows == expected


@pytest.mark.parametrize("ranks", range(1, 7))
@pytest.mark.parametrize("microbatches", [1, 2, 5, 7, 8, 12, 13])
def test_zbv_has_torchs_order_and_placement(ranks: int, microbatches: int) -> None:
    table = make("zbv", ranks, microbatches)
    expected = in_our_words(multi_stage("ScheduleZBVZeroBubble", ranks, microbatches, 2))
    assert table.rows == expected
    mapping = schedules.generate_stage_to_rank_mapping(ranks, 2 * ranks, style="v")
    assert mapping == {stage: table.rank_of(stage) for stage in range(2 * ranks)}


# ---- time


@pytest.mark.parametrize("method", ["gpipe", "1f1b"])
@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("microbatches", [1, 2, 3, 5, 8, 17, 32])
def test_bubble_of_equal_stages_is_exactly_the_formula(
    method: str, ranks: int, microbatches: int
) -> None:
    timing = make(method, ranks, microbatches).simulate(forward=1, backward=2)
    assert timing.bubble == (ranks - 1) / (microbatches + ranks - 1)
    assert timing.makespan == 3 * (microbatches + ranks - 1)
    assert timing.busy == (3 * microbatches,) * ranks


def test_interleaving_divides_the_bubble_by_the_chunks() -> None:
    # Each of 2 chunks is half as long: the bubble's time is half, of 3 · 8 + what is left.
    timing = make("interleaved", 4, 8, 2).simulate(forward=1, backward=2)
    idle = timing.makespan - timing.busy[0]
    plain = make("1f1b", 4, 8).simulate(forward=2, backward=4)
    assert idle == (plain.makespan - plain.busy[0]) / 2


def test_zero_bubble_idles_less_and_the_v_hardly_at_all() -> None:
    plain = make("1f1b", 4, 12).simulate(forward=1, backward=2)
    half = make("zb", 4, 12).simulate(forward=1, backward=2, weight=1)
    none = make("zbv", 4, 12).simulate(forward=1, backward=2, weight=1)
    assert none.bubble < half.bubble < plain.bubble
    # Rank r begins r later and ends r earlier: nothing else is idle (Qi et al. 2024, §6).
    assert none.makespan - none.busy[0] == 3


def test_simulation_by_hand() -> None:
    timing = make("1f1b", 2, 2).simulate(forward=[1, 2], backward=[3, 4], transfer=1)
    spans = timing.spans
    assert spans[Action("F", 0, 0)] == (0, 1)
    assert spans[Action("F", 1, 0)] == (2, 4)
    assert spans[Action("B", 1, 0)] == (4, 8)
    assert spans[Action("B", 0, 0)] == (9, 12)
    assert spans[Action("F", 1, 1)] == (8, 10)
    assert spans[Action("B", 1, 1)] == (10, 14)
    assert timing.makespan == 18
    assert timing.busy == (8, 12)


@given(
    case=st.sampled_from(WITH_CHUNKS),
    ranks=st.integers(1, 5),
    microbatches=st.integers(1, 9),
    data=st.data(),
)
def test_no_action_begins_before_what_it_needs(
    case: tuple[str, int], ranks: int, microbatches: int, data: st.DataObject
) -> None:
    table = make(case[0], ranks, microbatches, case[1])
    durations = st.lists(st.integers(1, 9), min_size=table.stages, max_size=table.stages)
    forward, backward = data.draw(durations), data.draw(durations)
    timing = table.simulate(forward, backward, transfer=2)
    for action, (begin, _) in timing.spans.items():
        for needed in table.needs(action):
            far = table.rank_of(needed.stage) != table.rank_of(action.stage)
            assert begin >= timing.spans[needed][1] + 2 * far
    assert sum(timing.busy) == microbatches * (sum(forward) + sum(backward))


# ---- what is wrong


def with_row(table: Table, rank: int, row: list[Action]) -> Table:
    rows = list(table.rows)
    rows[rank] = tuple(row)
    return Table(table.method, table.microbatches, table.chunks, tuple(rows))


def test_validate_names_what_is_wrong() -> None:
    table = make("1f1b", 2, 2)
    first, *rest = table.rows[0]
    with pytest.raises(ValueError, match="F0 of stage 0 is missing"):
        with_row(table, 0, rest).validate()
    with pytest.raises(ValueError, match="F0 of stage 0 is there twice"):
        with_row(table, 0, [first, first, *rest]).validate()
    with pytest.raises(ValueError, match="F0 of stage 1 is on rank 0"):
        with_row(table, 0, [table.rows[1][0], *rest]).validate()
    with pytest.raises(ValueError, match="B0 of stage 0 has no place in it"):
        with_row(table, 0, [*table.rows[0], Action("I", 0, 0)]).validate()
    deadlock = with_row(table, 0, list(reversed(table.rows[0])))
    with pytest.raises(ValueError, match="rank 0 cannot do B1 of stage 0, which needs F1"):
        deadlock.validate()
    with pytest.raises(ValueError, match="cannot do"):
        deadlock.simulate(1, 2)


def test_numbers_that_cannot_be_are_refused() -> None:
    for method, ranks, microbatches, chunks in (
        ("dualpipe", 2, 2, None), ("1f1b", 0, 2, None), ("1f1b", 2, 0, None),
        ("1f1b", 2, 2, 2), ("zbv", 2, 2, 1), ("interleaved", 2, 2, 0),
    ):  # fmt: skip
        with pytest.raises(Refused):
            make(method, ranks, microbatches, chunks)
    with pytest.raises(ValueError, match="1 durations for 2 stages"):
        make("1f1b", 2, 2).simulate([1], 2)
    assert {make(method, 2, 2).method for method in METHODS} == set(METHODS)
