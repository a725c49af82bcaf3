"""Where ranks meet: the store that a place names.

file:PATH          a file that all of them can open (ranks of one host)
tcp:HOST:PORT      rank 0 listens there
agent:HOST:PORT    torchrun's agent is listening there already
"""

import socket
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    FileStore,
    Store,
    TCPStore,
)

from shoal.errors import WorldError


def open_store(place: str, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The store at `place`. Raises `WorldError` if it cannot be had."""
    kind, _, where = place.partition(":")
    if kind == "file":
        return FileStore(where, world_size)
    host, _, port = where.rpartition(":")
    serves = kind == "tcp" and rank == 0
    try:
        return _tcp_store(host, int(port), world_size, timeout, serves=serves)
    except (OSError, dist.DistError) as error:
        what = "listen on" if serves else "reach rank 0 at"
        raise WorldError(
            f"cannot {what} {host}:{port}: {str(error).splitlines()[0]}",
            hint="The port may be taken by another program or blocked: choose another with "
            "MASTER_PORT (torchrun: --master-port).",
            rank=rank,
        ) from error


def _tcp_store(host: str, port: int, world_size: int, timeout: timedelta, *, serves: bool) -> Store:
    if not serves:
        return TCPStore(host, port, world_size, False, timeout, wait_for_workers=False)
    # TCPStore listens on every interface, whatever the host it is given: bind the address first.
    listener = socket.create_server((host, port))
    return TCPStore(
        host,
        port,
        world_size,
        True,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
