"""The supervisor: starts ranks on this host, hears signals for them, and says why one ended.

torchrun is not used for this: it listens on every interface, leaves its workers alive when it is
killed, restarts the whole group and prints some 45 lines of error.
"""

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from shoal.env import child_environment
from shoal.errors import PeerLost, RankLost, ShoalError, UsageError
from shoal.launch import allocator
from shoal.launch.scratch import Scratch
from shoal.launch.signals import StopSignals, end, held_back

Message = dict[str, Any]
OnSignal = Literal["pass on", "end"]

GRACE_S = 3.0  # how long the others may take to end, and to say why, once one rank has failed
POLL_S = 0.1


@dataclass
class _Rank:
    """One child process and the pipes to it."""

    number: int
    process: subprocess.Popen[bytes]
    task_fd: int
    report_fd: int
    failure: Scratch
    buffer: bytes = b""
    results: list[Any] = field(default_factory=list)
    open: bool = True

    def lines(self) -> list[Message]:
        """What has arrived since the last call; marks the end of the pipe."""
        data = os.read(self.report_fd, 1 << 16)
        if not data:
            self.open = False
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]

    @property
    def gone(self) -> bool:
        """Whether it can send no more. A child of its own may keep the pipe open after its end."""
        return not self.open or self.process.poll() is not None

    @property
    def killed(self) -> bool:
        """Whether a signal has ended it; a moment after its pipe was closed that is known."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(GRACE_S) < 0
        return False

    def last_words(self) -> dict[str, Any] | None:
        """Why it ended, in its own words; None where it left without a word, or in the middle."""
        try:
            words: dict[str, Any] = json.loads(self.failure.read())
        except ValueError:
            return None
        return words


class Ranks:
    """Ranks on this host, ready to run functions together.

    ``Ranks(n)`` starts n processes, which import the modules ``preload`` at once, whether there is
    a task yet or not; :meth:`call` runs a function on the first k of them. A rank that fails ends
    all of them: :meth:`call` raises the first failure, and the ranks are gone.
    """

    def __init__(self, size: int, *, threads: int = 1, preload: Sequence[str] = ()) -> None:
        if size < 1:
            raise UsageError(f"at least 1 rank is needed, given {size}")
        self.size = size
        self.threads = threads
        self._preload = tuple(preload)
        self._calls = 0
        self._store = Scratch("rendezvous")
        self._ranks: list[_Rank] = []
        try:
            for number in range(size):
                self._ranks.append(self._start(number))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def process_ids(self) -> tuple[int, ...]:
        return tuple(rank.process.pid for rank in self._ranks)

    @property
    def alive(self) -> bool:
        return bool(self._ranks) and all(rank.process.poll() is None for rank in self._ranks)

    def _start(self, number: int) -> _Rank:
        task_read, task_write = os.pipe()
        report_read, report_write = os.pipe()
        failure = Scratch(f"rank-{number}")
        arguments = {
            "rank": number,
            "parent": os.getpid(),
            "task_fd": task_read,
            "report_fd": report_write,
            "failure_fd": failure.fd,
            "store": f"file:{self._store.path}",
            "path": [str(Path(entry).absolute()) for entry in sys.path],
            "preload": self._preload,
        }
        environment = child_environment(
            allocator.settings(),
            OMP_NUM_THREADS=str(self.threads),
            MKL_NUM_THREADS=str(self.threads),
            GLOO_SOCKET_IFNAME="lo0" if sys.platform == "darwin" else "lo",
            NCCL_SOCKET_IFNAME="lo",
            TORCH_CPP_LOG_LEVEL="ERROR",
        )
        # SIGTERM asks a rank to stop; before it can hear that, the signal would just end it.
        with held_back(signal.SIGTERM):
            process = subprocess.Popen(
                [sys.executable, "-m", "shoal.launch.worker", json.dumps(arguments)],
                stdin=subprocess.DEVNULL,
                # Standard output belongs to the one document of `--json`: what user code prints
                # on a rank goes to standard error.
                stdout=_stderr_fd(),
                stderr=_stderr_fd(),
                env=environment,
                pass_fds=(task_read, report_write, failure.fd, self._store.fd),
                start_new_session=True,
            )
        os.close(task_read)
        os.close(report_write)
        return _Rank(number, process, task_write, report_read, failure)

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        ranks: int | None = None,
        on_message: Callable[[int, Message], None] = lambda _rank, _message: None,
        on_signal: OnSignal = "end",
        signals: StopSignals | None = None,
        spared: Callable[[int], bool] | None = None,
    ) -> list[Any]:
        """Run ``function(context, *arguments)`` on the first `ranks` ranks; their results in order.

        Results are JSON. ``on_message(rank, message)`` gets what ranks send meanwhile. With
        ``on_signal="pass on"`` the first SIGINT or SIGTERM reaches the ranks as SIGTERM, and they
        end in their own time; with "end" it ends them, by `Stopped`. A second one ends everything
        at once. ``signals``: who hears them, if that is not this call alone. ``spared``: asked
        whether a rank may be killed now and the others go on; its result is None then.

        Raises the first failing rank's own error, or `RankLost` if it left without a word.
        """
        members = self._ranks[: self.size if ranks is None else ranks]
        self._calls += 1
        place = {
            "world_size": len(members),
            "generation": f"call-{self._calls}",
            "threads": self.threads,
            "spares": spared is not None,
        }
        task = _pack((place, function, arguments))
        with contextlib.ExitStack() as stack:
            heard = stack.enter_context(StopSignals()) if signals is None else signals
            answer = end if on_signal == "end" else self._ask_to_stop
            stack.enter_context(heard.answered_by(answer))
            for rank in members:
                rank.results.clear()
                with contextlib.suppress(BrokenPipeError):  # it ended: _listen says why
                    _write(rank.task_fd, len(task).to_bytes(8, "little") + task)
            self._listen(members, on_message, spared or (lambda _rank: False))
        return [rank.results[0] if rank.results else None for rank in members]

    def _ask_to_stop(self, _number: int) -> None:
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(signal.SIGTERM)

    def _listen(
        self,
        members: Sequence[_Rank],
        on_message: Callable[[int, Message], None],
        spared: Callable[[int], bool],
    ) -> None:
        lost: set[int] = set()
        leave_by = math.inf  # once nobody is waited for but spared ones
        with selectors.DefaultSelector() as selector:
            for rank in members:
                selector.register(rank.report_fd, selectors.EVENT_READ, rank)
            while waiting := [r for r in members if not r.results and r.number not in lost]:
                if all(spared(rank.number) for rank in waiting):
                    leave_by = min(leave_by, time.monotonic() + GRACE_S)
                    if time.monotonic() > leave_by:
                        return
                for key, _ in selector.select(POLL_S):
                    self._take(key.data, on_message)
                    if not key.data.open:
                        selector.unregister(key.fd)
                for rank in waiting:
                    if not rank.results and rank.gone:
                        # What it had sent before it left is still in its pipe.
                        while rank.open and _readable(selector, rank.report_fd):
                            self._take(rank, on_message)
                        if rank.results:
                            continue
                        if not spared(rank.number) or rank.last_words() or not rank.killed:
                            raise self._first_failure(members, lost)
                        lost.add(rank.number)

    def _take(self, rank: _Rank, on_message: Callable[[int, Message], None]) -> None:
        for line in rank.lines():
            if "message" in line:
                on_message(rank.number, line["message"])
            else:
                rank.results.append(line["result"])

    def _first_failure(self, members: Sequence[_Rank], before: Collection[int]) -> ShoalError:
        """Give the others a moment to say what they saw, end them, and choose the cause.

        ``before``: ranks that were killed before, and could be spared.
        """
        deadline = time.monotonic() + GRACE_S
        lost: dict[int, float] = {}
        while time.monotonic() < deadline:
            for rank in members:
                if rank.process.poll() is not None:
                    lost.setdefault(rank.number, time.monotonic())
            if len(lost) == len(members):
                break
            time.sleep(0.01)
        self._kill()
        # First causes before what follows from them, a kill from outside before all others: what
        # its peers say then, in whatever words, is never the cause.
        failures: list[tuple[int, float, ShoalError]] = []
        for rank in members:
            words = rank.last_words()
            if words is not None:
                error = ShoalError.from_json(words["error"])
                failures.append((3 if words["secondary"] else 1, words["time"], error))
            elif rank.number in before:
                failures.append((2, 0.0, _lost(rank)))
            elif rank.number in lost:
                killed = rank.process.returncode == -signal.SIGKILL
                failures.append((0 if killed else 1, lost[rank.number], _lost(rank)))
        self.close()
        if not failures:
            return RankLost("a rank closed its pipe and did not end")
        _, _, error = min(failures, key=lambda failure: failure[:2])
        if isinstance(error, PeerLost):
            return RankLost(f"the connection between ranks broke: {error.message}", rank=error.rank)
        return error

    def _kill(self) -> None:
        for rank in self._ranks:
            if rank.process.poll() is None:
                rank.process.kill()

    def close(self) -> None:
        """End the ranks and give back what they held. Idle ranks leave by themselves.

        Those that never had a task have nothing to tidy up, and may be busy with imports.
        """
        for rank in self._ranks:
            _close(rank.task_fd)
        if self._calls == 0:
            self._kill()
        deadline = time.monotonic() + GRACE_S
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                busy = not rank.results and self._calls > 0
                rank.process.wait(0 if busy else max(0.0, deadline - time.monotonic()))
        self._kill()
        for rank in self._ranks:
            rank.process.wait()
            _close(rank.report_fd)
            rank.failure.close()
        self._ranks = []
        self._store.close()


def _readable(selector: selectors.BaseSelector, fd: int) -> bool:
    return any(key.fd == fd for key, _ in selector.select(0))


def _lost(rank: _Rank) -> RankLost:
    code = rank.process.returncode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = (
            "The system does that when memory runs out (see `dmesg`), or somebody did it."
            if name == "SIGKILL"
            else None
        )
        return RankLost(
            f"process {rank.process.pid} was killed by {name}", hint=hint, rank=rank.number
        )
    return RankLost(
        f"process {rank.process.pid} left with exit status {code} and no word", rank=rank.number
    )


def _pack(value: tuple[Any, ...]) -> bytes:
    import cloudpickle

    try:
        packed: bytes = cloudpickle.dumps(value)
    except Exception as error:
        raise UsageError(
            f"this function cannot be carried to the ranks: {error}",
            hint="It refers to something that cannot be copied to another process "
            "(an open file, a lock, a running thread): make it inside the function instead.",
        ) from error
    return packed


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


def _stderr_fd() -> int:
    try:
        return sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # a notebook, or a test that captures
        return 2
