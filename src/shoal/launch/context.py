"""What a function is told about the rank that it runs on."""

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
    share of the processor's cores. ``send`` carries a JSON object to whoever watches. ``spares``:
    whether some ranks may die without an end to all, as whoever started them can start others.
    """

    rank: int
    world_size: int
    local_rank: int
    store: str
    generation: str
    threads: int
    send: Send
    stop_requested: threading.Event = field(default_factory=threading.Event)
    spares: bool = False


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
