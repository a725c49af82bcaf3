"""How ranks ask the system for memory: tensors come and go at each step, the pages had better stay.

By default glibc gives large blocks back as soon as they are free, and the system has to find and
clear the pages anew at the next step. Two single-thread ranks, forward, backward and AdamW of a
small ResNet in bf16 and a transformer of 4 layers: speed beside glibc's own settings, page faults a
step and rank, highest and last resident MiB:

                          ResNet   transformer   faults           highest    last
    glibc's own           1.00     1.00          12,416, 21,169   514, 774   478, 774
    kept                  1.06     1.07          32, 1            511, 793   511, 793
    huge pages            1.07     1.08          27, 34           514, 776   484, 720
    kept, on huge pages   1.09     1.10          1, 4             519, 775   519, 775
    given back at 64 KiB  0.67     0.82          77,352, 161,970  446, 659   365, 381

The last line is what shows how much memory is in use, at a price. What the user has set goes first.
Strategies that save memory call `give_back` on their ranks.
"""

import contextlib
import ctypes
import os

from shoal import env

COMPACT_BYTES = 1 << 20  # what is larger goes back to the system when it is free
_FAST_BYTES = 1 << 29
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_HUGE_PAGES_SINCE = (2, 35)  # glibc.malloc.hugetlb


def settings() -> dict[str, str]:
    """Variables for a process to be started, which its C library reads then; none for others."""
    if _glibc() < _HUGE_PAGES_SINCE:
        return {}
    return {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "MALLOC_MMAP_THRESHOLD_": str(_FAST_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    }


def give_back() -> None:
    """From now on, in this process: return free memory to the system at once, and stay small.

    For strategies that cut a model to save memory: what one block has used must not stay with the
    process while another is in use. Both limits are fixed: glibc raises its own as blocks are
    freed. Nothing happens where the user has set them, or with another C library.
    """
    if _glibc() == (0,) or env.malloc_threshold() not in (None, str(_FAST_BYTES)):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            library.mallopt(option, COMPACT_BYTES)


def _glibc() -> tuple[int, ...]:
    """The version of the GNU C library; (0,) where there is another."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, OSError, ValueError):
        return (0,)
    numbers = version.split(".")
    return (
        tuple(map(int, numbers)) if name == "glibc" and all(map(str.isdecimal, numbers)) else (0,)
    )
