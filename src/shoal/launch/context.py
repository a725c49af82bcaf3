"""What a function is told about the rank that it runs on."""

import json
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shoal.env import World

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


def listen_for_stop(flag: threading.Event) -> None:
    """Let SIGTERM set `flag`; SIGINT is the supervisor's business."""
    signal.signal(signal.SIGTERM, lambda *_: flag.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def joined_context(world: World, threads: int, send: Send) -> Context:
    """The context of a rank that torchrun or Slurm has started: it hears signals itself."""
    flag = threading.Event()

    def stop(number: int, _frame: object) -> None:
        if flag.is_set():
            # A second signal ends the process at once, as a shell would report it.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        flag.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    kind = "agent" if world.store_is_running else "tcp"
    return Context(
        rank=world.rank,
        world_size=world.world_size,
        local_rank=world.local_rank,
        store=f"{kind}:{world.master_addr}:{world.master_port}",
        generation=f"join-{world.restart_count}",
        threads=threads,
        send=send,
        stop_requested=flag,
    )


def to_line(value: dict[str, Any]) -> bytes:
    """One JSON object as one line."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
