"""What a function is told about the rank that it runs on."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from shoal.env import World
from shoal.launch.signals import NUMBERS

Send = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Context:
    """One rank's place among the ranks that run a function together.

    ``store`` says where the ranks meet: ``file:PATH`` or ``tcp:HOST:PORT``; ``generation`` is a
    prefix of keys there, so that the groups of two calls never mix. ``threads`` is this rank's
    share of the processor's cores. ``send`` carries a JSON object to whoever watches.
    """

    rank: int
    world_size: int
    local_rank: int
    store: str
    generation: str
    threads: int
    send: Send
    stop_requested: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def stop_signals_heard() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, in a rank that nobody hears them for.

    After the first, a second ends the process as it would any: even inside a collective that
    waits for ranks that are gone, where no handler of Python's runs.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def stop(_number: int, _frame: object) -> None:
        requested.set()
        for number in NUMBERS:
            signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in NUMBERS}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def joined_context(
    world: World, threads: int, send: Send, stop_requested: threading.Event
) -> Context:
    """The context of a rank that torchrun or Slurm has started."""
    kind = "agent" if world.store_is_running else "tcp"
    return Context(
        rank=world.rank,
        world_size=world.world_size,
        local_rank=world.local_rank,
        store=f"{kind}:{world.master_addr}:{world.master_port}",
        generation=f"join-{world.restart_count}",
        threads=threads,
        send=send,
        stop_requested=stop_requested,
    )
