"""A run folder: the inputs of a run, what happened in it, and a lock so that one process writes.

    runs/digits-0007/
      recipe.yaml  strategy.json  cluster.json     enough to run it again
      run.json                                     summary, replaced as a whole
      metrics.jsonl  events.jsonl                  a line each time
      checkpoints/
      .lock                                        the process that writes

NaN and infinity are written as null, so that every file is valid JSON.

    run = Run.create(Path("runs"), "digits")
    with run.lock():
        run.log_metrics({"step": 1, "loss": 2.3})
        run.write_summary({"state": "done"})
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from shoal.errors import DiskFull, RunFolderError

if TYPE_CHECKING:
    from shoal.cluster import Cluster
    from shoal.recipe import Recipe
    from shoal.strategy import Strategy

_INPUTS = ("recipe.yaml", "strategy.json", "cluster.json")
_LOCK = ".lock"
_STALENESS = "staleness.jsonl"


class Lines:
    """A file of JSON lines to add to: each is written whole, by one call, and can be read at once.

    Opened with the first line, and kept open: to open it for every one takes longer than the rest.
    A line that a killed process has left half written is dropped then.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._descriptor: int | None = None

    def add(self, values: Mapping[str, Any]) -> None:
        """Add a line. NaN and infinity become null. Raises `DiskFull` or `RunFolderError`."""
        line = json.dumps(_finite(values), allow_nan=False).encode() + b"\n"
        with _writing(self._file):
            if self._descriptor is None:
                self._descriptor = self._open()
            if os.write(self._descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self._file, flags, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                os.ftruncate(descriptor, self._file.read_bytes().rfind(b"\n") + 1)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Run:
    """A run folder; everything is read from it when asked for."""

    path: Path

    @classmethod
    def create(cls, root: Path, name: str) -> "Run":
        """Make the next of ``root/NAME-0001``, ``root/NAME-0002``, …

        Processes that do this at once get different folders: making a folder that is there fails.
        """
        if not name or name != Path(name).name or name.startswith("."):
            raise RunFolderError(
                f"a run cannot be named {name!r}", hint="give a name that a folder can have"
            )
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)
            number = max((number for number, _ in _numbered(root, name)), default=0)
            while True:
                number += 1
                path = root / f"{name}-{number:04d}"
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    return cls(path)

    @classmethod
    def create_at(cls, path: Path) -> "Run":
        """Make a run folder of this very name; it may be there if it is empty."""
        with _writing(path):
            path.mkdir(parents=True, exist_ok=True)
            there = sorted(each.name for each in path.iterdir() if each.name != _LOCK)
        if there:
            raise RunFolderError(
                f"{path} is not empty: it holds {_some(there)}",
                hint="give another folder with --out, or go on with the run in it with --resume",
            )
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "Run":
        """The run in this folder. Raises `RunFolderError` that says what is missing."""
        if not path.is_dir():
            what = "is a file" if path.exists() else "is not there"
            raise RunFolderError(f"{path} {what}: a run is a folder with {_some(_INPUTS)}")
        missing = [name for name in _INPUTS if not (path / name).is_file()]
        if missing:
            raise RunFolderError(f"{path} is not a run folder: it has no {_some(missing)}")
        return cls(path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> "Recipe":
        from shoal.recipe import Recipe

        return Recipe.from_yaml(self.path / "recipe.yaml")

    @property
    def strategy(self) -> "Strategy":
        from shoal.strategy import Strategy

        return Strategy.read(self.path / "strategy.json")

    @property
    def cluster(self) -> "Cluster":
        from shoal.cluster import Cluster

        return Cluster.from_yaml(self.path / "cluster.json")

    def write_inputs(self, recipe: "Recipe", strategy: "Strategy", cluster: "Cluster") -> None:
        """Write the three inputs; from then on :meth:`open` finds a run here."""
        writers = dict(zip(_INPUTS, (recipe.to_yaml, strategy.write, cluster.write), strict=True))
        with _writing(self.path):
            for name, write in writers.items():
                temporary = self.path / f".{os.getpid()}.{name}"
                try:
                    write(temporary)
                    temporary.replace(self.path / name)  # a full disk costs nothing that is there
                finally:
                    temporary.unlink(missing_ok=True)

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    @property
    def summary(self) -> dict[str, Any]:
        """`run.json`; empty before its first write."""
        file = self.path / "run.json"
        try:
            value = json.loads(file.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise RunFolderError(f"{file} is damaged: {error}") from error
        if not isinstance(value, dict):
            raise RunFolderError(f"{file} is damaged: it holds no mapping")
        return value

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Replace `run.json`: whoever reads it sees the old one or the new one, whole."""
        text = json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n"
        _replace(self.path / "run.json", text.encode())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a last one that is half written is left out."""
        return [value for _, value in _lines(self.path / "metrics.jsonl")]

    def events(self) -> list[dict[str, Any]]:
        """The lines of `events.jsonl`; a last one that is half written is left out."""
        return [value for _, value in _lines(self.path / "events.jsonl")]

    def log_metrics(self, values: Mapping[str, Any]) -> None:
        """Add one line to `metrics.jsonl`. NaN and infinity become null."""
        with self.metrics_log() as log:
            log.add(values)

    def metrics_log(self) -> "Lines":
        """`metrics.jsonl`, to add many lines to; opened with the first one."""
        return Lines(self.path / "metrics.jsonl")

    def staleness_log(self) -> "Lines":
        """`staleness.jsonl`, of asynchronous runs: a line per contribution."""
        return Lines(self.path / _STALENESS)

    def staleness(self) -> list[dict[str, Any]]:
        """The lines of `staleness.jsonl`, in the order in which contributions were applied."""
        return read_lines(self.path / _STALENESS)

    def log_event(
        self,
        event: str,
        message: str,
        rank: int | None = None,
        step: int | None = None,
        phase: str | None = None,
    ) -> None:
        """Add one line to `events.jsonl`, with the time in seconds since 1970."""
        values = {
            "time": time.time(),
            "event": event,
            "message": message,
            "rank": rank,
            "step": step,
            "phase": phase,
        }
        with Lines(self.path / "events.jsonl") as log:
            log.add(values)

    def cut_after(self, step: int) -> None:
        """Drop the lines of metrics and events of later steps, and what is half written.

        Lines without a step stay. Each file is replaced as a whole.
        """
        # Metrics are after a step, contributions to one.
        for name, last in (("metrics.jsonl", step), ("events.jsonl", step), (_STALENESS, step - 1)):
            file = self.path / name
            if not file.exists():
                continue
            kept = [line for line, value in _lines(file) if (value.get("step") or 0) <= last]
            _replace(file, b"".join(line + b"\n" for line in kept))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process. Raises `RunFolderError` naming the process that has it.

        The kernel drops the lock when the process ends, however it ends. The file stays: removing
        it would let two processes lock two files of one name.
        """
        file = self.path / _LOCK
        with _writing(self.path):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC  # no program started here inherits it
            descriptor = os.open(file, flags, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                raise RunFolderError(
                    f"{self.path} is in use by process {holder or 'unknown'}",
                    hint="wait until it ends, or give another folder with --out",
                ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            try:
                yield
            finally:  # said in words: a child that was just forked may still have the descriptor
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


def newest_unfinished(root: Path, name: str) -> Run:
    """The run of this name with the highest number whose state is not `done`.

    Raises `RunFolderError` that says what is there if there is none.
    """
    folders = sorted(_numbered(root, name), reverse=True)
    seen = []
    for _, path in folders:
        try:
            run = Run.open(path)
        except RunFolderError:
            seen.append(f"{path.name} (no run folder)")
            continue
        state = run.summary.get("state")
        if state != "done":
            return run
        seen.append(f"{path.name} (done)")
    what = f"it has {_some(seen)}" if seen else "it has none of that name"
    if not root.is_dir():
        what = "there is no such folder"
    raise RunFolderError(
        f"{root} has no unfinished run of {name}: {what}",
        hint="start one without --resume, or name its folder with --out",
    )


def _numbered(root: Path, name: str) -> list[tuple[int, Path]]:
    pattern = re.compile(re.escape(name) + r"-([0-9]{4,})")
    if not root.is_dir():
        return []
    matches = ((pattern.fullmatch(path.name), path) for path in root.iterdir())
    return [(int(match[1]), path) for match, path in matches if match]


def _some(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{path} cannot be written to: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(
                what, hint="free some space, or write to another disk with --out"
            ) from error
        raise RunFolderError(
            what,
            hint="give a folder that this user can write to with --out",
        ) from error


def _finite(value: Any) -> Any:
    """The value with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The values of a file of JSON lines; a last one that is half written is left out.

    None in a file that is not there. Raises `RunFolderError` for what is no such file.
    """
    return [value for _, value in _lines(file)]


def _lines(file: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line's bytes and its value."""
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise RunFolderError(f"{file}:{number} is damaged: {error}") from error
        if not isinstance(value, dict):
            raise RunFolderError(f"{file}:{number} is damaged: it holds no mapping")
        found.append((line, value))
    return found


def _replace(file: Path, content: bytes) -> None:
    """Put a file in the place of another; at any time one of the two is there, whole."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with _writing(file):
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
