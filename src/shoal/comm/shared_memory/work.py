"""Collectives in order, one at a time: at once in the caller's thread, or in a thread of the group.

    turns = Turns("shoal-collectives")
    turns.run(job)                 # now, if nothing is waiting; else after what is
    work = turns.start(job)        # in the group's thread; work.wait(), work.get_future()

A job returns the tensors of its result and raises if it fails. Two thread switches cost more than a
small collective, so a caller who waits anyway runs it itself. So does the group's thread when a
callback of a future starts another one (torch's PowerSGD hook does, and waits for it): it comes
right after the one that it follows from, on all ranks.
"""

import queue
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

JOIN_S = 5.0  # how long a thread that is not stuck may take to end

Job = Callable[[], list[Tensor]]
Future = torch.futures.Future[Any]


class Work(dist.Work):
    """torch's handle of a collective that is under way; its future has the tensors, or the error.

    Not `_create_work_from_future`: what that makes loses the error when it is waited for.
    """

    def __init__(self, future: Future, opened: Future) -> None:
        super().__init__()
        self._future = future
        self._opened = opened

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for the end. Raises the collective's error; its time-out is the group's."""
        self._future.wait()
        return True

    def get_future(self) -> Future:
        return self._future

    def is_completed(self) -> bool:
        return self._opened.done()

    def is_success(self) -> bool:
        return self._opened.done() and self.exception() is None

    def exception(self) -> Any:
        """The error, None if there is none (yet)."""
        if not self._opened.done():
            return None
        try:
            self._future.wait()
        except RuntimeError as error:
            return error
        return None

    def result(self) -> list[Tensor]:
        tensors: list[Tensor] = self._future.wait()
        return tensors

    def synchronize(self) -> None:
        self._future.wait()


class Done(dist.Work):
    """A collective that is over, and went well."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def get_future(self) -> Future:
        future: Future = torch.futures.Future()
        future.set_result(self._tensors)
        return future

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> Any:
        return None

    def result(self) -> list[Tensor]:
        return self._tensors

    def synchronize(self) -> None:
        return


class Turns:
    """The jobs of one group, run in the order in which they were given."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[tuple[Job, Future] | None] = queue.SimpleQueue()
        self._mutex = threading.Lock()
        self._turn = threading.Lock()
        self._waiting = 0  # given and not over
        self._thread: threading.Thread | None = None

    def run(self, job: Job) -> dist.Work:
        """Run `job` to its end; raises what it raises."""
        if self._in_own_thread():
            with self._turn:
                return Done(job())
        with self._mutex:
            idle = self._waiting == 0
            if idle:
                self._waiting += 1
                self._turn.acquire()  # free, as nothing is waiting
        if not idle:
            work = self.start(job)
            work.wait()
            return work
        try:
            return Done(job())
        finally:
            self._turn.release()
            with self._mutex:
                self._waiting -= 1

    def start(self, job: Job) -> Work:
        """Give `job` to the group's thread."""
        opened: Future = torch.futures.Future()
        # What a callback raises is an error for C++ too; `set_exception` would hand DDP's reducer
        # an exception as if it were the result.
        future = opened.then(_outcome)
        if self._in_own_thread():
            self._finish(job, opened)
            return Work(future, opened)
        with self._mutex:
            self._waiting += 1
            if self._thread is None:
                # A daemon: a collective that waits for a lost peer must not keep the process.
                self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                self._thread.start()
            self._jobs.put((job, opened))
        return Work(future, opened)

    def close(self, last: Callable[[], None]) -> None:
        """Let the thread end after what it was given; ``last`` is done unless a job is stuck."""
        with self._mutex:
            if self._thread is not None:
                self._jobs.put(None)
        if self._turn.acquire(blocking=False):
            last()
            self._turn.release()
            if self._thread is not None and not self._in_own_thread():
                # An interpreter that ends while the thread is in torch's C++ would abort.
                self._thread.join(JOIN_S)

    def _in_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def _serve(self) -> None:
        while (entry := self._jobs.get()) is not None:
            self._finish(*entry, waiting=1)
            del entry  # no tensor is kept until the next job comes

    def _finish(self, job: Job, opened: Future, waiting: int = 0) -> None:
        """Run a job and tell its future; ``waiting``: how many fewer there are then."""
        result: list[Tensor] | BaseException
        with self._turn:
            try:
                result = job()
            except BaseException as error:
                result = error
        with self._mutex:
            self._waiting -= waiting
        opened.set_result(result)


def _outcome(done: Future) -> Any:
    result = done.value()
    if isinstance(result, BaseException):
        raise result
    return result
