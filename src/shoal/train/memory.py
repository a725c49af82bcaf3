"""Peak memory of a rank, as the contract measures it."""

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


class PeakMemory:
    """CPU: highest resident size minus that at construction. CUDA: torch's highest allocation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = _status_bytes("VmRSS")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        # VmHWM, not ru_maxrss: the latter survives exec and may be the parent's.
        return max(0, _status_bytes("VmHWM") - self._before)
