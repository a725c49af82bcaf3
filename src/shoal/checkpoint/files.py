"""Files that are on the disk when a call returns, and errors that say why one is not.

    write -> fsync -> (rename, elsewhere) -> fsync of the folder

Only after the last of these has a new name survived a power failure.

    write(folder / "manifest.json", [memoryview(text)])
    sync_folder(folder)
"""

import contextlib
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from shoal.errors import DiskFull, RunError
from shoal.units import format_bytes

# EFBIG is a limit on the size of one file, EDQUOT one on what a user may keep.
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write(path: Path, chunks: Iterable[memoryview]) -> int:
    """Write a new file, sync it, and return its bytes; on any error no file is left behind."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        try:
            written = sum(_write_all(descriptor, chunk) for chunk in chunks)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    return written


def _write_all(descriptor: int, chunk: memoryview) -> int:
    done = 0
    while done < len(chunk):  # Linux writes at most 2 GiB a call
        done += os.write(descriptor, chunk[done:])
    return done


def sync_folder(path: Path) -> None:
    """Make names that were created, renamed or removed in this folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_failure(
    error: OSError, what: str, folder: Path, *, needed: int | None, free: int | None
) -> RunError:
    """The error a user sees where `what` could not be written; `needed` and `free` in bytes."""
    message = f"{what} could not be written to {folder}: {error.strerror or error}"
    if error.errno not in _NO_SPACE:
        return RunError(message, hint=f"make {folder} a folder that this user can write to")
    if needed is not None:
        message += f"; it needs {format_bytes(needed)} ({needed} bytes)"
        if free is not None:
            message += f", {format_bytes(free)} ({free} bytes) were free"
    return DiskFull(
        f"{message}. What was saved before is untouched",
        hint="free some space, write to another disk with --out, or keep fewer checkpoints "
        "(checkpoint.keep)",
    )
