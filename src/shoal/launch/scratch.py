"""Small files that ranks share and that nobody has to clean up.

On Linux they are anonymous memory files, inherited as descriptors and opened again through
`/proc/self/fd`: they vanish with the last process that holds them, even if all of them are killed.
Elsewhere they are files in a private temporary folder.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path


class Scratch:
    """A small shared file: `fd` to inherit, `path` to open in a process that has inherited it."""

    def __init__(self, name: str) -> None:
        self._folder: Path | None = None
        if sys.platform == "linux":
            self.fd = os.memfd_create(f"shoal-{name}", 0)
            self.path = f"/proc/self/fd/{self.fd}"
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="shoal-"))
            self.path = str(self._folder / name)
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

    def read(self) -> bytes:
        """Everything that was written."""
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
