"""SIGINT and SIGTERM: the first asks, in whatever way fits the moment; the second ends.

with StopSignals() as signals:
    prepare()                                # the first raises Stopped
    with signals.answered_by(pass_it_on):    # the first calls this, at once or as soon as it can
        work()
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

from shoal.errors import Stopped

NUMBERS = (signal.SIGINT, signal.SIGTERM)

Answer = Callable[[int], None]


def end(number: int) -> None:
    """The answer where there is nothing to save: raise `Stopped` where the program stands."""
    raise Stopped(f"ended by {signal.Signals(number).name}")


def wait(_number: int) -> None:
    """The answer while something must not be torn: the next answer is told of it."""


class StopSignals:
    """Hears SIGINT and SIGTERM while it is entered. Outside of the main thread it hears nothing.

    A second signal leaves with 128 + its number, by `SystemExit`, so that ranks are ended and the
    terminal is given back on the way out; a third leaves on the spot.
    """

    def __init__(self) -> None:
        self.heard: list[int] = []
        self._answer: Answer = end
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in NUMBERS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _hear(self, number: int, _frame: object) -> None:
        self.heard.append(number)
        if len(self.heard) == 1:
            self._answer(number)
        elif len(self.heard) == 2:
            raise SystemExit(128 + number)
        else:
            os._exit(128 + number)

    @contextlib.contextmanager
    def answered_by(self, answer: Answer) -> Iterator[None]:
        """Answer the first signal so; one that was heard before is answered now.

        An answer may therefore be called twice for one signal.
        """
        before, self._answer = self._answer, answer
        try:
            if self.heard:
                answer(self.heard[0])
            yield
        finally:
            self._answer = before


@contextlib.contextmanager
def stop_signals_heard() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, in a rank that nobody hears them for.

    A second one leaves at once with 128 + its number. A thread listens, as a rank may wait in a
    collective for ranks that are gone, where no handler of Python's runs.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    thread = threading.Thread(target=_listen, args=(read_end, requested), daemon=True)
    thread.start()
    before = {number: signal.signal(number, lambda *_: None) for number in NUMBERS}
    wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield requested
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write_end)
        thread.join()


def _listen(read_end: int, requested: threading.Event) -> None:
    """Take the number of each signal as it comes, until the other end is closed."""
    while number := os.read(read_end, 1):
        if number[0] in NUMBERS:
            if requested.is_set():
                os._exit(128 + number[0])
            requested.set()
    os.close(read_end)


@contextlib.contextmanager
def held_back(number: int) -> Iterator[None]:
    """Processes started in this block get `number` only once they let it through themselves."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
