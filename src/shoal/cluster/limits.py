"""What a process may use of this machine, as the kernel tells it: needs the standard library.

    available_cores()      # 2: the process's affinity, and the cgroup's quota of processor time

Apart from the other facts of a machine, so that a command can ask before it loads anything.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: its affinity, within the cgroup's quota rounded up."""
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for quota in _cpu_quotas(root) if quota > 0]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def computes_in_bf16(root: Path = Path("/")) -> bool:
    """Whether the processor multiplies bfloat16 matrices itself (AVX512-BF16 or AMX, Arm's BF16).

    Without such instructions bf16 is emulated, and slower than float32.
    """
    for line in text_of(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return not _BF16_FLAGS.isdisjoint(value.split())
    return False


def _cpu_quotas(root: Path) -> Iterator[float]:
    """Cores' worth of processor time that each cgroup around this process may use."""
    for folder, _ in cgroup_folders(root, "cpu"):
        numbers = text_of(folder / "cpu.max").split() or [
            text_of(folder / "cpu.cfs_quota_us").strip(),
            text_of(folder / "cpu.cfs_period_us").strip(),
        ]
        if len(numbers) == 2 and all(each.isdecimal() for each in numbers) and int(numbers[1]):
            yield int(numbers[0]) / int(numbers[1])


def cgroup_folders(root: Path, controller: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """Folders of the cgroups around this process, innermost first, and their files' names.

    Version 2 has one tree, version 1 one for each controller. Inside a container the path that
    `/proc` names may lie outside of what is mounted: then only the folders that exist count.
    """
    for line in text_of(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            base, names = root / "sys/fs/cgroup", {"memory": "memory.max"}
        elif controller in controllers.split(","):
            base = root / "sys/fs/cgroup" / controller
            names = {"memory": "memory.limit_in_bytes"}
        else:
            continue
        inner = base / path.strip("/")
        for folder in (inner, *inner.parents):
            if folder.is_dir():
                yield folder, names
            if folder == base:
                break


def text_of(path: Path) -> str:
    """What a file of the kernel says; nothing where it is not there or not to be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
