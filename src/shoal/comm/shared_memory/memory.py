"""The memory that the ranks of a group share: anonymous, found through the group's store.

    rank 0    makes a memory file, tells "process:descriptor" and a nonce     store["memory"]
    others    open /proc/PROCESS/fd/DESCRIPTOR and map it
    all       say whether that worked, read what the others say               store["rank-0"], …

Nothing has a name in a file system, so nothing is left when all ranks are killed at once. If a
single rank cannot map the memory (another host, container or user, a system without memory files or
process descriptors), all raise `CannotShare` with its reason, and can use gloo together.

    memory = meet(store, rank, size, names)       # Memory(buffer, layout, process_fds, …)
"""

import contextlib
import json
import mmap
import os
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]  # in torch, not in its stubs

from shoal.cluster.limits import available_cores
from shoal.comm.shared_memory import native, plain
from shoal.comm.shared_memory.failure import CannotShare
from shoal.comm.shared_memory.layout import MAX_RANKS, Layout

_FILE = "shoal-collectives"
_NONCE_BYTES = 16


@dataclass(frozen=True)
class Memory:
    """Memory that all ranks of a group have mapped, and how to see that one of them has ended."""

    buffer: mmap.mmap
    layout: Layout
    rank: int
    processes: tuple[int, ...]
    process_fds: tuple[int, ...]  # of all ranks, readable once a process has ended; own: -1
    core: str  # the core that all ranks have: `native.NAME` or `plain.NAME`
    cores: int  # processor cores that the ranks have together

    def close(self) -> None:
        """Give back the descriptors. The memory goes when nobody refers to it any more."""
        for descriptor in self.process_fds:
            if descriptor >= 0:
                with contextlib.suppress(OSError):
                    os.close(descriptor)


def meet(store: Store, rank: int, size: int, core: str | None = None) -> Memory:
    """Map the group's memory. Collective; ``core`` forces one. Raises `CannotShare` on all ranks.

    The store has to be the group's own.
    """
    layout = Layout(size)
    with contextlib.ExitStack() as until_all_have_mapped:
        buffer, own = _map(store, rank, layout, until_all_have_mapped)
        own["core"] = core or (native.NAME if native.available() else plain.NAME)
        store.set(f"rank-{rank}", json.dumps(own))
        said = [json.loads(store.get(f"rank-{each}")) for each in range(size)]
        # Rank 0 keeps its descriptor until all have said that they are done with it.
    reasons = [f"rank {r}: {each['reason']}" for r, each in enumerate(said) if each["reason"]]
    if reasons or buffer is None:
        raise CannotShare("; ".join(reasons))
    names = {each["core"] for each in said}
    process_fds = [-1 if r == rank else _process_fd(each["process"]) for r, each in enumerate(said)]
    return Memory(
        buffer,
        layout,
        rank,
        tuple(each["process"] for each in said),
        tuple(process_fds),
        native.NAME if names == {native.NAME} else plain.NAME,
        min(
            len({core for each in said for core in each["cores"]}),
            max(each["quota"] for each in said),
        ),
    )


def _map(
    store: Store, rank: int, layout: Layout, until_all_have_mapped: contextlib.ExitStack
) -> tuple[mmap.mmap | None, dict[str, Any]]:
    """The memory, or None; and what this rank tells the others."""
    own: dict[str, Any] = {
        "process": os.getpid(),
        "cores": _cores(),
        "quota": available_cores(),
        "reason": "",
    }
    buffer = None
    try:
        _check_system(layout.size)
        if rank == 0:
            buffer, told = _make(layout, until_all_have_mapped)
    except (CannotShare, OSError) as error:
        own["reason"] = told_reason = str(error)
        told = {"reason": told_reason}
    if rank == 0:
        store.set("memory", json.dumps(told))
    elif not own["reason"]:
        place = json.loads(store.get("memory"))
        try:
            buffer = None if "reason" in place else _open(place, layout)
        except (CannotShare, OSError) as error:
            own["reason"] = str(error)
    return buffer, own


def _check_system(size: int) -> None:
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        raise CannotShare("anonymous memory files are Linux's")
    if size > MAX_RANKS:
        raise CannotShare(f"at most {MAX_RANKS} ranks can share memory, there are {size}")
    if not native.available():
        plain.check_processor()
    os.close(_process_fd(os.getpid()))  # Linux 5.3


def _process_fd(process: int) -> int:
    """A descriptor of a process, readable once it has ended; also if it has ended already."""
    try:
        return os.pidfd_open(process)
    except ProcessLookupError:  # readable, as the other end is closed
        read, write = os.pipe()
        os.close(write)
        return read


def _make(
    layout: Layout, until_all_have_mapped: contextlib.ExitStack
) -> tuple[mmap.mmap, dict[str, Any]]:
    descriptor = os.memfd_create(_FILE, os.MFD_CLOEXEC)
    until_all_have_mapped.callback(os.close, descriptor)
    # Reserved now: a page that cannot be had later would be a SIGBUS in the middle of a collective.
    os.posix_fallocate(descriptor, 0, layout.total_bytes + _NONCE_BYTES)
    buffer = mmap.mmap(descriptor, layout.total_bytes + _NONCE_BYTES)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    buffer[layout.total_bytes :] = nonce
    place = {"host": _host(), "process": os.getpid(), "fd": descriptor, "nonce": nonce.hex()}
    return buffer, place


def _open(place: dict[str, Any], layout: Layout) -> mmap.mmap:
    if place["host"] != _host():
        raise CannotShare("it is on another host (or in another container) than rank 0")
    path = Path(f"/proc/{int(place['process'])}/fd/{int(place['fd'])}")
    if not str(path.readlink()).startswith(f"/memfd:{_FILE}"):
        raise CannotShare(f"{path} is not the memory of rank 0")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        buffer = mmap.mmap(descriptor, layout.total_bytes + _NONCE_BYTES)
    finally:
        os.close(descriptor)
    if buffer[layout.total_bytes :].hex() != place["nonce"]:
        raise CannotShare(f"{path} is the memory of another group")
    return buffer


def _host() -> str:
    """One kernel, one set of process numbers: host names may be equal, or differ in containers."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
