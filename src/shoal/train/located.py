"""Where an error came from: every exception of a block becomes one that says rank and step."""

import contextlib
import errno
from collections.abc import Iterator

from shoal.comm import peer_failures
from shoal.errors import DiskFull, ShoalError
from shoal.launch import described

# EFBIG is a limit on the size of one file, EDQUOT one on what a user may keep.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        raise described(error, rank).located(step=step) from error


def _disk_full(error: OSError) -> DiskFull:
    return DiskFull(
        f"no space left to write {error.filename or 'a file'}",
        hint="Earlier checkpoints are untouched. Make space, then go on with --resume.",
    )
