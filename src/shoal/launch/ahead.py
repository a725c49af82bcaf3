"""Ranks that start before all is checked: importing torch takes longer than everything before it.

    supervisor   parse ─ start ─ read the recipe ─ look at the data ─ open the folder ─ task ▶ …
    ranks                  └──── Python ─ import torch ────────────────────────────────┘

    with Ahead(("torch",)) as ahead:
        ahead.start(2, threads=1)          # a guess, perhaps
        check()                            # an error here ends them: they have done nothing
        with ahead.take(2, threads=1) as ranks:
            ranks.call(function)

A rank without a task trains nothing, opens nothing and says nothing.
"""

from types import TracebackType
from typing import Self

from shoal.launch.supervisor import Ranks


class Ahead:
    """Ranks waiting to be taken; those that nobody takes end with the block.

    ``preload``: the modules that ranks import while they wait.
    """

    def __init__(self, preload: tuple[str, ...]) -> None:
        self._preload = preload
        self._waiting: Ranks | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._drop()

    @property
    def process_ids(self) -> tuple[int, ...]:
        return () if self._waiting is None else self._waiting.process_ids

    def start(self, size: int, threads: int) -> None:
        """Have `size` ranks waiting; others that were started on a guess are ended."""
        waiting = self._waiting
        if waiting is not None and waiting.alive and self._is(waiting, size, threads):
            return
        self._drop()
        self._waiting = Ranks(size, threads=threads, preload=self._preload)

    def take(self, size: int, threads: int) -> Ranks:
        """`size` ranks, the caller's from now on: those that wait, or new ones."""
        self.start(size, threads)
        assert self._waiting is not None
        taken, self._waiting = self._waiting, None
        return taken

    def _is(self, ranks: Ranks, size: int, threads: int) -> bool:
        return (ranks.size, ranks.threads) == (size, threads)

    def _drop(self) -> None:
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
