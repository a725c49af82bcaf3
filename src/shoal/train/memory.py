"""Peak memory of a rank, as the contract measures it."""

import contextlib
import ctypes
import gc
from pathlib import Path

import torch


def _status_bytes(key: str) -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux
        return 0
    for line in status.splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def give_back() -> None:
    """Return to the system what earlier work of this process has left: it is no part of the run."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """CPU: highest resident size minus that at construction. CUDA: torch's highest allocation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with contextlib.suppress(OSError):  # not Linux
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        self._before = _status_bytes("VmRSS")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        # VmHWM, not ru_maxrss: the latter survives exec and may be the parent's.
        return max(0, _status_bytes("VmHWM") - self._before)
