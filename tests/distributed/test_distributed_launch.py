"""Functions on ranks: how they get there, what comes back, whose error is shown."""

import os
import time
import warnings
from typing import Any

import pytest

from shoal.errors import NotFinite
from shoal.launch import Context


def test_results_come_back_in_the_order_of_ranks(pool: Any) -> None:
    def slow_first(context: Context, offset: int) -> list[Any]:
        time.sleep(0.05 * (context.world_size - context.rank))
        return [offset + context.rank, context.world_size, {"ü": None}]

    for ranks in (4, 2, 1):
        found = pool.call(slow_first, 10, ranks=ranks)
        assert found == [[10 + rank, ranks, {"ü": None}] for rank in range(ranks)]


def test_each_call_has_a_generation_of_its_own(pool: Any) -> None:
    first, second = (pool.call(lambda context: context.generation) for _ in range(2))
    assert len(set(first)) == len(set(second)) == 1
    assert first != second


def test_ranks_are_processes_that_stay(pool: Any) -> None:
    first, second = (pool.call(lambda _context: os.getpid()) for _ in range(2))
    assert first == second == list(pool.process_ids)
    assert len({*first, os.getpid()}) == 5


def test_messages_arrive_in_order_before_the_result(pool: Any) -> None:
    heard: list[tuple[int, Any]] = []

    def talk(context: Context) -> None:
        for number in range(200):
            context.send({"number": number, "text": "x" * number})

    pool.call(talk, ranks=2, on_message=lambda rank, told: heard.append((rank, told)))
    for rank in range(2):
        own = [told for who, told in heard if who == rank]
        assert own == [{"number": number, "text": "x" * number} for number in range(200)]


def test_a_warning_on_a_rank_is_an_error_in_tests(pool: Any) -> None:
    def warn(_context: Context) -> str:
        try:
            warnings.warn("something is deprecated", FutureWarning, stacklevel=1)
        except FutureWarning as error:
            return str(error)
        return "nothing"

    assert pool.call(warn, ranks=1) == ["something is deprecated"]


def _fail(context: Context) -> None:
    if context.rank == 2:
        raise NotFinite("the loss is nan", hint="Lower it.", step=7)
    time.sleep(0.5)
    raise ValueError(f"rank {context.rank} failed later")


def test_the_first_failing_ranks_own_error_is_raised(pool: Any) -> None:
    with pytest.raises(NotFinite) as error:
        pool.call(_fail)
    assert (error.value.rank, error.value.step, error.value.hint) == (2, 7, "Lower it.")
    assert "NotFinite" in str(error.value.traceback)
