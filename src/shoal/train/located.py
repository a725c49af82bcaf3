"""Where an error came from: every exception of a block becomes one that says rank and step."""

import contextlib
import errno
import re
from collections.abc import Iterator

from shoal.comm import peer_failures
from shoal.errors import DiskFull, OutOfMemory, ShoalError
from shoal.launch import described

# EFBIG is a limit on the size of one file, EDQUOT one on what a user may keep.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's allocator for the CPU raises a plain RuntimeError, with one of these in its text.
_NO_MEMORY = ("can't allocate memory", "not enough memory")


@contextlib.contextmanager
def located(rank: int, step: int | None = None) -> Iterator[None]:
    """Let every error of this block say where it came; a lost peer becomes `PeerLost`."""
    try:
        with peer_failures():
            yield
    except ShoalError as error:
        error.located(step=step)
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise _disk_full(error).located(rank=rank, step=step) from error
        if _is_out_of_memory(error):
            raise _out_of_memory(error).located(rank=rank, step=step) from error
        raise described(error, rank).located(step=step) from error


def _disk_full(error: OSError) -> DiskFull:
    return DiskFull(
        f"no space left to write {error.filename or 'a file'}",
        hint="Earlier checkpoints are untouched. Make space, then go on with --resume.",
    )


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _out_of_memory(error: Exception) -> OutOfMemory:
    asked = re.search(r"[Tt]ried to allocate ([0-9.]+ ?\w*)", str(error))
    tensor = f" for {asked[1]} more" if asked else ""
    return OutOfMemory(
        f"out of memory: there was no room{tensor}",
        hint="Let ranks share the model (/zero3 on dpN, ppN or tpN), keep fewer activations "
        "(+recompute, or mb:M), or use a smaller batch or model.",
    )
