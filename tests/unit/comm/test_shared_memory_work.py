"""The order of a group's jobs, their futures and errors, and jobs that follow from others."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.comm.shared_memory.work import Turns


class Diary:
    """Jobs that write down their number and thread, some when they are let go."""

    def __init__(self) -> None:
        self.turns = Turns("a-group")
        self.done: list[tuple[int, str]] = []
        self.go = threading.Event()

    def job(self, number: int, *, held: bool = False) -> Any:
        def run() -> list[Tensor]:
            if held:
                self.go.wait()
            self.done.append((number, threading.current_thread().name))
            return [torch.tensor(number)]

        return run

    @property
    def numbers(self) -> list[int]:
        return [number for number, _ in self.done]


def test_a_caller_who_waits_runs_it_himself_if_it_is_his_turn() -> None:
    diary = Diary()
    diary.turns.run(diary.job(1))
    held = diary.turns.start(diary.job(2, held=True))
    assert not held.is_completed()
    caller = threading.Thread(target=diary.turns.run, args=(diary.job(3),))
    caller.start()
    diary.go.set()
    caller.join()
    held.wait()
    here = threading.current_thread().name
    assert diary.done == [(1, here), (2, "a-group"), (3, "a-group")]


def test_jobs_run_in_order_and_one_at_a_time() -> None:
    diary = Diary()
    works = [diary.turns.start(diary.job(number, held=number == 0)) for number in range(50)]
    diary.go.set()
    assert works[-1].get_future().wait()[0].item() == 49
    assert diary.numbers == list(range(50))
    assert all(work.is_success() for work in works)


def test_what_a_callback_starts_comes_next_and_can_be_waited_for() -> None:
    diary = Diary()

    def follow(done: Any) -> int:
        diary.turns.start(diary.job(2)).wait()
        diary.turns.run(diary.job(3))
        value: int = done.value()[0].item()
        return value

    first = diary.turns.start(diary.job(1, held=True)).get_future().then(follow)
    last = diary.turns.start(diary.job(4))
    diary.go.set()
    assert first.wait() == 1
    last.wait()
    assert diary.numbers == [1, 2, 3, 4]


def test_an_error_reaches_who_waits_and_what_follows() -> None:
    turns = Turns("a-group")

    def fail() -> list[Tensor]:
        raise RuntimeError("a peer is lost")

    work = turns.start(fail)
    with pytest.raises(RuntimeError, match="a peer is lost"):
        work.wait()
    assert work.is_completed()
    assert not work.is_success()
    assert "a peer is lost" in str(work.exception())
    after = work.get_future().then(lambda done: done.value())
    with pytest.raises(RuntimeError, match="a peer is lost"):
        after.wait()
    with pytest.raises(RuntimeError, match="a peer is lost"):
        turns.run(fail)
    assert turns.run(list).result() == []


def test_what_is_left_at_the_end_is_done_unless_a_job_is_stuck() -> None:
    closed: list[bool] = []
    turns = Turns("a-group")
    turns.start(list).wait()
    turns.close(lambda: closed.append(True))
    assert closed == [True]
    diary = Diary()
    work = diary.turns.start(diary.job(1, held=True))
    entered = diary.turns
    while entered._turn.acquire(blocking=False):
        entered._turn.release()
    entered.close(lambda: closed.append(False))
    diary.go.set()
    work.wait()
    assert closed == [True]
