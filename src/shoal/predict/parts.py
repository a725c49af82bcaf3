"""Predictions on their way to a file: a part for each batch, so that a second call goes on.

predictions.csv                        there once all is predicted, whole
.predictions.csv.parts/
  what.json                            which models, data and way: another's parts are not used
  part-000000.safetensors …            ids, labels (−1: unknown), probabilities [n, classes]

with PartsFolder.open(target, what) as parts:
    for step in range(parts.done(steps), steps):
        parts.write(step, Rows(ids, labels, probabilities))
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shoal.errors import DiskFull, RunError, UsageError


class Rows(NamedTuple):
    """Predictions of some examples, in order."""

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]


@dataclass(frozen=True)
class PartsFolder:
    """Where parts are written, each once and whole."""

    path: Path

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, what: dict[str, Any]) -> Iterator["PartsFolder"]:
        """Hold the folder for this process; made if it is not there.

        Raises `UsageError` for one that holds predictions of something else, or is in use.
        """
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"{path} is in use: another process predicts into it",
                    hint="Wait until it ends, or give another file with --out.",
                ) from error
            folder = cls(path)
            folder._claim(json.loads(json.dumps(what)))
            yield folder
        finally:
            os.close(lock)

    def _claim(self, what: dict[str, Any]) -> None:
        file = self.path / "what.json"
        if not file.exists():
            _replace(file, json.dumps(what, indent=2).encode())
            return
        try:
            known = json.loads(file.read_bytes())
        except ValueError:
            known = {}
        other = [key for key in what if known.get(key) != what[key]]
        if other:
            raise UsageError(
                f"{self.path} holds unfinished predictions of something else: "
                f"{', '.join(other)} differ",
                hint=f"Remove that folder, or give another file with --out.\nrm -r {self.path}",
            )

    def file(self, step: int) -> Path:
        return self.path / f"part-{step:06d}.safetensors"

    def done(self, steps: int) -> int:
        """How many parts are there from the first on, all of them whole."""
        for step in range(steps):
            try:
                self.read(step)
            except (OSError, TypeError, SafetensorError):
                return step
        return steps

    def read(self, step: int) -> Rows:
        return Rows(**load(self.file(step).read_bytes()))

    def write(self, step: int, rows: Rows) -> None:
        """Write a part, whole or not at all. Raises `DiskFull` or `RunError`."""
        temporary = self.path / f".part-{os.getpid()}.tmp"
        with _writing(self.path):
            try:
                with temporary.open("wb") as stream:
                    stream.write(save(rows._asdict()))
                    stream.flush()
                    os.fsync(stream.fileno())
                temporary.replace(self.file(step))
            finally:
                temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Drop all parts: what they were for is there."""
        shutil.rmtree(self.path, ignore_errors=True)


def folder_beside(target: Path) -> Path:
    """The folder of the parts of `target`."""
    return target.with_name(f".{target.name}.parts")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = DiskFull if error.errno in (28, 122) else RunError
        raise kind(
            f"{path} cannot be written to: {error.strerror or error}",
            hint="Free some space, or give a file elsewhere with --out.",
        ) from error


def _replace(file: Path, content: bytes) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    with _writing(file):
        temporary.write_bytes(content)
        temporary.replace(file)
