"""One thing at a time in a thread: a save that training does not wait for.

main thread    start(save) ── steps … ── failed? ── steps … ── finish()
the thread         └── hash, meet, write, sync, rename ──┘        └── its result, or its error

background = Background()
background.start(lambda: save(folder, held, meeting))
background.finish()                 # returns, or raises, what `save` did
"""

import threading
import time
from collections.abc import Callable

from shoal.checkpoint.saving import SavedCheckpoint


class Background:
    """Runs saves in threads, never two at once.

    ``hidden_s``: seconds of those threads in which nobody waited for them.
    """

    def __init__(self) -> None:
        self.hidden_s = 0.0
        self._thread: threading.Thread | None = None
        self._saved: SavedCheckpoint | None = None
        self._error: BaseException | None = None
        self._seconds = 0.0

    @property
    def failed(self) -> bool:
        """Whether the save has ended with an error, which :meth:`finish` will raise."""
        return self._error is not None

    def start(self, save: Callable[[], SavedCheckpoint]) -> None:
        """Begin a save. The one before must be finished."""
        if self._thread is not None:
            raise RuntimeError("a save is in flight: finish it first")
        # Daemon: an interpreter that leaves in the middle leaves a half-written folder, no more.
        self._thread = threading.Thread(
            target=self._run, args=(save,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _run(self, save: Callable[[], SavedCheckpoint]) -> None:
        started = time.perf_counter()
        try:
            self._saved = save()
        except BaseException as error:
            self._error = error
        self._seconds = time.perf_counter() - started

    def finish(self) -> SavedCheckpoint | None:
        """Wait for the save in flight; what it returned, or None where there is none.

        Raises what it raised, once.
        """
        if self._thread is None:
            return None
        began = time.perf_counter()
        self._thread.join()
        self.hidden_s += max(0.0, self._seconds - (time.perf_counter() - began))
        saved, error = self._saved, self._error
        self._thread = self._saved = self._error = None
        if error is not None:
            raise error
        return saved
