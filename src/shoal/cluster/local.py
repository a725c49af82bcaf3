"""What this machine has, found without torch: cores, memory, CUDA devices.

    detect(ranks=2)     # Host(name=…, cores=2, devices=(Device(kind="cpu", count=2, …),))

Cores are those that this process may use (affinity, and the cgroup's quota of processor time);
memory is the machine's, or the cgroup's limit if that is lower; CUDA devices are those that
`nvidia-smi` lists and CUDA_VISIBLE_DEVICES lets through.
"""

import csv
import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from shoal import env
from shoal.cluster.limits import available_cores, cgroup_folders, text_of
from shoal.cluster.parts import Device, Host
from shoal.errors import WorldError

_QUERY = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
_QUERY_TIMEOUT_S = 20.0


def detect(ranks: int | None = None, root: Path = Path("/")) -> Host:
    """This machine as a host whose devices are what ``ranks`` ranks run on.

    The CUDA devices if there are enough of them (at least one if ``ranks`` is None), else equal
    shares of the processor: one share a rank, or one a core. ``root`` holds `proc` and `sys`.
    Raises WorldError for fewer than one rank.
    """
    if ranks is not None and ranks < 1:
        raise WorldError(f"a cluster needs 1 rank or more; given {ranks}")
    cores, memory = available_cores(root), available_memory_bytes(root)
    gpus = cuda_devices()
    if gpus and len(gpus) >= (ranks or 1):
        devices = _grouped(gpus[: ranks or len(gpus)])
    else:
        shares = ranks or cores
        share = Device(kind="cpu", name=cpu_name(root), count=shares, memory_bytes=memory // shares)
        devices = (share,)
    name = platform.node() or "local"
    return Host(name=name, cores=cores, memory_bytes=memory, devices=devices)


def available_memory_bytes(root: Path = Path("/")) -> int:
    """The machine's memory in bytes, or the lowest limit of the cgroups around this process."""
    total = 0
    for line in text_of(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            total = int(line.split()[1]) * 1024
    total = total or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [
        int(text)
        for folder, names in cgroup_folders(root, "memory")
        for text in [text_of(folder / names["memory"]).strip()]
        if text.isdecimal() and int(text) > 0
    ]
    return min([total, *limits])


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name as its maker writes it, else its architecture."""
    for line in text_of(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.machine() or "cpu"


def cuda_devices() -> tuple[Device, ...]:
    """The CUDA devices that ranks may use, in CUDA's order; none without a working `nvidia-smi`.

    Slices of a device (MIG) are not listed by it, so they are not found.
    """
    if shutil.which(_QUERY[0]) is None:
        return ()
    try:
        done = subprocess.run(
            _QUERY, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    return tuple(device for _, _, device in _visible(list(_rows(done.stdout))))


def _rows(text: str) -> Iterator[tuple[str, str, Device]]:
    """(index, uuid, device) of each line that can be read; memory is in MiB there."""
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) == 4 and row[3].strip().isdecimal() and row[2].strip():
            memory = int(row[3]) * 2**20
            device = Device(kind="cuda", name=row[2].strip(), memory_bytes=memory)
            yield row[0].strip(), row[1].strip(), device


def _visible(rows: list[tuple[str, str, Device]]) -> list[tuple[str, str, Device]]:
    """Those of CUDA_VISIBLE_DEVICES, in its order; as in CUDA, the first unknown entry ends it."""
    entries = env.visible_cuda_devices()
    if entries is None:
        return rows
    found: list[tuple[str, str, Device]] = []
    for entry in entries:
        matching = [
            row
            for row in rows
            if row[0] == entry or (not entry.isdecimal() and row[1].startswith(entry))
        ]
        if len(matching) != 1:
            break
        found += matching
    return found


def _grouped(devices: tuple[Device, ...]) -> tuple[Device, ...]:
    counts = Counter(devices)
    return tuple(device.model_copy(update={"count": count}) for device, count in counts.items())
