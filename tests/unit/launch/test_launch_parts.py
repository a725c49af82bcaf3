"""The parts of the launcher that need no process: scratch files, signals, errors, contexts."""

import json
import os
import signal
import sys
import threading

import pytest

from shoal.env import World, child_environment
from shoal.errors import RunError, Stopped, UsageError
from shoal.launch import Ahead, Ranks, allocator, joined_context, worker
from shoal.launch.failure import described
from shoal.launch.scratch import Scratch
from shoal.launch.signals import StopSignals, end, wait
from shoal.launch.supervisor import _pack


def test_a_scratch_file_is_one_file_by_descriptor_and_by_path() -> None:
    scratch = Scratch("test")
    assert scratch.read() == b""
    with open(scratch.path, "wb") as file:  # noqa: PTH123 (as a rank opens it)
        file.write("Größe".encode())
    assert scratch.read().decode() == "Größe"
    scratch.close()
    scratch.close()
    assert scratch.fd == -1


def test_what_cannot_be_carried_is_named() -> None:
    lock = threading.Lock()
    with pytest.raises(UsageError, match=r"cannot be carried to the ranks.*lock"):
        _pack((lambda: lock,))


def test_at_least_one_rank() -> None:
    with pytest.raises(UsageError, match="at least 1 rank is needed, given 0"):
        Ranks(0)


def test_an_error_of_a_rank_says_whose_line_it_was() -> None:
    try:
        raise ValueError("of the user's")
    except ValueError as error:
        told = described(error, 3)
    assert isinstance(told, RunError)
    assert told.where == "rank 3"
    assert "ValueError: of the user's" in told.message
    assert "test_launch_parts.py" in str(told.hint)
    assert "Traceback" in str(told.traceback)


def test_a_shoal_error_keeps_the_rank_that_it_names() -> None:
    assert described(RunError("lost", rank=1), 0).rank == 1


@pytest.mark.parametrize(("agent", "kind"), [(True, "agent"), (False, "tcp")])
def test_the_context_of_a_rank_that_was_started_elsewhere(agent: bool, kind: str) -> None:
    world = World(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        master_addr="10.0.0.1",
        master_port=29500,
        launcher="torchrun",
        store_is_running=agent,
        restart_count=2,
    )
    context = joined_context(world, 3, lambda _message: None, threading.Event())
    assert (context.rank, context.world_size, context.local_rank) == (5, 8, 1)
    assert context.store == f"{kind}:10.0.0.1:29500"
    assert context.generation == "join-2"
    assert context.threads == 3


# ---- signals


def test_the_first_signal_asks_and_the_second_ends() -> None:
    heard: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals, signals.answered_by(heard.append):
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
        with pytest.raises(SystemExit) as second:
            os.kill(os.getpid(), signal.SIGINT)
        assert second.value.code == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_heard_while_waiting_is_answered_later() -> None:
    heard: list[int] = []
    with StopSignals() as signals, signals.answered_by(wait):
        os.kill(os.getpid(), signal.SIGINT)
        with signals.answered_by(heard.append):
            assert heard == [signal.SIGINT]


def test_with_nothing_to_save_the_first_ends() -> None:
    with StopSignals(), pytest.raises(Stopped, match="ended by SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGINT"):
        end(signal.SIGINT)


# ---- what ranks are started with


def test_memory_is_asked_for_in_huge_pages_where_the_c_library_can(monkeypatch) -> None:
    monkeypatch.setattr(os, "confstr", lambda _name: "glibc 2.36")
    assert allocator.settings()["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    for other in ("glibc 2.34", "glibc", "musl 1.2", None):
        monkeypatch.setattr(os, "confstr", lambda _name, other=other: other)
        assert allocator.settings() == {}


def test_what_the_user_has_set_goes_before_a_default_and_behind_a_must(monkeypatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    given = {"MALLOC_TRIM_THRESHOLD_": "1", "MALLOC_MMAP_THRESHOLD_": "1"}
    environment = child_environment(given, OMP_NUM_THREADS="2")
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "65536"
    assert environment["MALLOC_MMAP_THRESHOLD_"] == "1"
    assert environment["OMP_NUM_THREADS"] == "2"


class _Started:
    """Ranks without processes."""

    made: list["_Started"]

    def __init__(self, size: int, *, threads: int, preload: tuple[str, ...]) -> None:
        self.size, self.threads, self.preload = size, threads, preload
        self.alive = True
        _Started.made.append(self)

    def close(self) -> None:
        self.alive = False


@pytest.fixture
def started(monkeypatch) -> list[_Started]:
    _Started.made = []
    monkeypatch.setattr("shoal.launch.ahead.Ranks", _Started)
    return _Started.made


def test_a_right_guess_is_taken_and_outlives_its_block(started) -> None:
    with Ahead(("torch",)) as ahead:
        ahead.start(2, 1)
        taken = ahead.take(2, 1)
        assert len(started) == 1
    assert taken is started[0]
    assert taken.alive
    assert taken.preload == ("torch",)


@pytest.mark.parametrize("wanted", [(3, 1), (2, 2)])
def test_a_wrong_guess_is_ended_and_replaced(started, wanted) -> None:
    with Ahead(()) as ahead:
        ahead.start(2, 1)
        ahead.start(*wanted)
        taken = ahead.take(*wanted)
    assert [each.alive for each in started] == [False, True]
    assert (taken.size, taken.threads) == wanted


def test_ranks_that_have_died_while_waiting_are_not_handed_out(started) -> None:
    with Ahead(()) as ahead:
        ahead.start(2, 1)
        started[0].alive = False
        assert ahead.take(2, 1) is started[1]


def test_ranks_that_nobody_takes_end_with_the_block(started) -> None:
    with Ahead(()) as ahead:
        ahead.start(2, 1)
    assert not started[0].alive


def test_a_stop_asked_for_once_a_result_is_told_is_for_the_next_task(monkeypatch) -> None:
    """The supervisor may ask as soon as it has the result: the rank must not forget it then."""
    requested, tasks, seen = threading.Event(), [b"first", b"second", None], []

    def run_task(*_given):
        seen.append(requested.is_set())

    def send(_value):
        requested.set()

    def leave(status):
        raise SystemExit(status)

    read, write = os.pipe()
    arguments = {"parent": os.getppid(), "rank": 0, "path": sys.path, "preload": []}
    descriptors = {"task_fd": read, "report_fd": write, "failure_fd": write}
    monkeypatch.setattr(sys, "argv", ["worker", json.dumps(arguments | descriptors)])
    for name, stand_in in (
        ("die_with", lambda _parent: None),
        ("hear_stop", lambda: requested),
        ("sender", lambda _fd: send),
        ("preload", lambda _modules: None),
        ("read_task", lambda _pipe: tasks.pop(0)),
        ("run_task", run_task),
        ("leave", leave),
    ):
        monkeypatch.setattr(worker, name, stand_in)
    with pytest.raises(SystemExit):
        worker.main()
    os.close(write)
    assert seen == [False, True]
