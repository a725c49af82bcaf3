"""`Ranks`: functions on processes, and what happens when one fails. No torch is needed for that."""

import os
import signal
import threading
import time

import pytest
from shoal_process import alive, gone_within

from shoal.errors import RankLost, ShoalError, Stopped, UsageError
from shoal.launch import Ranks, StopSignals

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr("shoal.launch.supervisor.GRACE_S", 1.0)


def test_results_come_in_the_order_of_ranks_and_messages_on_the_way():
    heard = []
    base = 10

    def double(context, number):
        context.send({"rank": context.rank})
        return {"is": base + number * 2, "of": context.world_size, "threads": context.threads}

    with Ranks(3, threads=2) as ranks:
        results = ranks.call(double, 4, on_message=lambda rank, said: heard.append((rank, said)))
        assert results == [{"is": 18, "of": 3, "threads": 2}] * 3
        assert sorted(heard) == [(rank, {"rank": rank}) for rank in range(3)]
        assert len(ranks.call(lambda context: context.rank, ranks=2)) == 2
        processes = ranks.process_ids
    assert not any(alive(process) for process in processes)


def test_modules_beside_a_script_are_found_on_the_ranks(tmp_path, monkeypatch):
    (tmp_path / "beside_it.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)

    def use(context):
        import beside_it

        return beside_it.VALUE

    with Ranks(1) as ranks:
        assert ranks.call(use) == [7]


MEET = """
import os, pathlib, time
folder = pathlib.Path(__file__).parent
(folder / f"{os.getpid()}.here").touch()
deadline = time.monotonic() + 40
while len(list(folder.glob("*.here"))) < 2 and time.monotonic() < deadline:
    time.sleep(0.01)
MET = len(list(folder.glob("*.here")))
"""


def test_ranks_import_side_by_side_before_they_have_a_task(tmp_path, monkeypatch):
    """Each import ends only once the other rank's has begun; there is no task meanwhile."""
    (tmp_path / "meet_there.py").write_text(MEET)
    monkeypatch.syspath_prepend(tmp_path)

    def loaded(context):
        import sys

        return sys.modules["meet_there"].MET

    with Ranks(2, preload=("meet_there", "no_such_module")) as ranks:
        deadline = time.monotonic() + 40
        while len(list(tmp_path.glob("*.here"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list(tmp_path.glob("*.here"))) == 2
        assert ranks.call(loaded) == [2, 2]


def test_ranks_without_a_task_end_at_once_though_they_are_busy_importing(tmp_path, monkeypatch):
    (tmp_path / "long_import.py").write_text("import time\ntime.sleep(100)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("shoal.launch.supervisor.GRACE_S", 50.0)
    ranks = Ranks(2, preload=("long_import",))
    processes = ranks.process_ids
    began = time.monotonic()
    ranks.close()
    assert time.monotonic() - began < 25  # they would sleep for longer, and be waited for
    assert not any(alive(process) for process in processes)


def test_the_first_failure_is_the_one_that_is_raised():
    def fail(context):
        if context.rank == 1:
            raise ZeroDivisionError("this came first")
        time.sleep(0.3)
        raise ValueError("this came later")

    ranks = Ranks(3)
    processes = ranks.process_ids
    with pytest.raises(ShoalError, match="ZeroDivisionError: this came first") as caught:
        ranks.call(fail)
    assert caught.value.rank == 1
    assert "test_faults_launch.py" in caught.value.hint
    assert "Traceback" in caught.value.traceback
    assert gone_within(processes, 20)
    assert not ranks.alive


def test_ranks_that_wait_are_ended_when_one_fails():
    def fail_or_wait(context):
        if context.rank == 0:
            raise RuntimeError("mine")
        time.sleep(100)

    began = time.monotonic()
    with Ranks(2) as ranks, pytest.raises(ShoalError, match="mine"):
        ranks.call(fail_or_wait)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "was killed by SIGKILL"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "was killed by SIGSEGV"),
        (lambda: os._exit(5), "left with exit status 5 and no word"),
    ],
)
def test_a_rank_that_leaves_without_a_word(end, said):
    def leave(context):
        if context.rank == 1:
            end()
        time.sleep(100)

    with Ranks(2) as ranks, pytest.raises(RankLost, match=said) as caught:
        ranks.call(leave)
    assert caught.value.rank == 1


def test_a_rank_whose_child_lives_on_is_missed_all_the_same():
    def leave_a_child(context):
        if os.fork() == 0:
            time.sleep(40)
            os._exit(0)
        os._exit(7)

    began = time.monotonic()
    with Ranks(1) as ranks, pytest.raises(RankLost, match="exit status 7"):
        ranks.call(leave_a_child)
    assert time.monotonic() - began < 30


def test_what_cannot_be_carried_is_named():
    lock = threading.Lock()
    with Ranks(1) as ranks:
        with pytest.raises(UsageError, match=r"cannot be carried to the ranks.*lock"):
            ranks.call(lambda context: lock.locked())
        assert ranks.call(lambda context: 1) == [1]


def test_no_ranks_at_all_is_refused():
    with pytest.raises(UsageError, match="at least 1 rank is needed, given 0"):
        Ranks(0)


def test_passed_on_a_signal_lets_ranks_end_in_their_own_time():
    def until_asked(context):
        context.send({})
        # As training does: looked at again and again. `Event.wait` shares a lock with the handler.
        deadline = time.monotonic() + 30
        while not context.stop_requested.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        return context.stop_requested.is_set()

    with Ranks(2) as ranks:
        interrupt = once(lambda: os.kill(os.getpid(), signal.SIGINT))
        results = ranks.call(until_asked, on_message=interrupt, on_signal="pass on")
        assert results == [True, True]
        # It was for that call: the next is not asked to stop.
        assert ranks.call(lambda context: context.stop_requested.is_set()) == [False, False]


def once(act):
    done = []

    def on_message(_rank, _message):
        if not done:
            done.append(True)
            act()

    return on_message


def test_a_signal_that_came_before_the_ranks_reaches_them():
    with StopSignals() as signals, signals.answered_by(lambda _number: None):
        os.kill(os.getpid(), signal.SIGTERM)
        with Ranks(2) as ranks:  # Python itself is starting there
            asked = ranks.call(
                lambda context: context.stop_requested.wait(20),
                on_signal="pass on",
                signals=signals,
            )
    assert asked == [True, True]


def test_a_signal_may_end_a_call():
    def wait(context):
        context.send({})
        time.sleep(100)

    ranks = Ranks(2)
    processes = ranks.process_ids
    with ranks, pytest.raises(Stopped, match="ended by SIGTERM"):
        ranks.call(wait, on_message=once(lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert gone_within(processes, 20)


def test_a_second_signal_leaves_with_128_and_its_number():
    def deaf(context):
        context.send({})
        time.sleep(100)

    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    ranks = Ranks(2)
    processes = ranks.process_ids
    with ranks, pytest.raises(SystemExit) as caught:
        ranks.call(deaf, on_message=once(twice), on_signal="pass on")
    assert caught.value.code == 130
    assert gone_within(processes, 20)


def test_in_another_thread_it_works_and_hears_nothing():
    found = []

    def work():
        with Ranks(1) as ranks:
            found.extend(ranks.call(lambda context: "here"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["here"]


def _die_or_wait(context, how, folder):
    """Rank 2 leaves in one of several ways; the others wait until it has."""
    import pathlib

    begun = pathlib.Path(folder) / "begun"
    if context.rank == 2:
        begun.touch()
        if how == "error":
            raise ZeroDivisionError("its own fault")
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
        time.sleep(50)
    while not begun.exists():
        time.sleep(0.01)
    time.sleep(0.5)
    if how == "another" and context.rank == 1:
        raise ValueError("this is the cause, later")
    return [context.rank, context.spares]


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_spared_rank_may_be_killed_and_the_others_end_in_their_time(tmp_path, how):
    with Ranks(3) as ranks:
        processes = ranks.process_ids
        results = ranks.call(_die_or_wait, how, str(tmp_path), spared=lambda rank: rank == 2)
        assert results == [[0, True], [1, True], None]
    assert gone_within(processes, 20)


@pytest.mark.parametrize(
    ("how", "spared", "said", "of_rank"),
    [
        ("kill", (), "killed by SIGKILL", 2),
        ("kill", (1,), "killed by SIGKILL", 2),
        ("error", (2,), "its own fault", 2),  # it would fail again
        ("exit", (2,), "exit status 7", 2),
        ("another", (2,), "the cause, later", 1),
    ],
)
def test_whatever_else_happens_ends_all(tmp_path, how, spared, said, of_rank):
    with pytest.raises(ShoalError, match=said) as caught:
        Ranks(3).call(_die_or_wait, how, str(tmp_path), spared=lambda rank: rank in spared)
    assert caught.value.rank == of_rank
