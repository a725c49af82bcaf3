"""Ranks as threads that meet at a barrier: how several ranks save, without processes."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest


class ThreadedMeeting:
    """One rank's seat; a rank that never comes breaks the barrier for all after `timeout_s`."""

    timeout_s = 20

    def __init__(self, rank: int, seats: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(seats)
        self._seats = seats
        self._barrier = barrier

    def all_gather_json(self, value: Any) -> list[Any]:
        self._seats[self.rank] = json.dumps(value)  # travels as text, as between processes
        self._barrier.wait(self.timeout_s)
        heard = [json.loads(seat) for seat in self._seats]
        self._barrier.wait(self.timeout_s)
        return heard


@pytest.fixture
def on_ranks() -> Callable[..., list[Any]]:
    """``on_ranks(3, work)``: what `work(meeting)` returned, or raised, on each rank."""

    def run(size: int, work: Callable[[ThreadedMeeting], Any]) -> list[Any]:
        seats: list[Any] = [None] * size
        barrier = threading.Barrier(size)
        with ThreadPoolExecutor(size) as pool:
            futures = [
                pool.submit(work, ThreadedMeeting(rank, seats, barrier)) for rank in range(size)
            ]
            return [future.exception() or future.result() for future in futures]

    return run
