"""A rank: reads functions from an inherited pipe, runs them, reports in JSON.

python -m shoal.launch.worker '{"rank": 0, "parent": 4711, "task_fd": 5, …}'
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NoReturn

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Ask the kernel to end this process when its parent ends, however that comes about."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request was made
        os._exit(1)


def read_task(pipe: BinaryIO) -> bytes | None:
    """One framed task, or None when the supervisor has closed the pipe."""
    header = pipe.read(8)
    if len(header) < 8:
        return None
    return pipe.read(int.from_bytes(header, "little"))


def last_words(fd: int, rank: int, error: BaseException) -> None:
    """Write why this rank ends into its small file, with the time: the first one is the cause."""
    from shoal.errors import PeerLost
    from shoal.launch.failure import described

    told = described(error, rank).to_json()
    words = {
        "time": time.monotonic(),
        "secondary": isinstance(error, PeerLost),
        "error": told,
    }
    if not _write_whole(fd, words):
        # A limit on the size of files holds for this one too.
        words["error"] = {**told, "message": told["message"][:200], "hint": None, "traceback": None}
        _write_whole(fd, words)


def _write_whole(fd: int, words: dict[str, Any]) -> bool:
    text = json.dumps(words).encode()
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        return os.pwrite(fd, text, 0) == len(text)
    return False


def run_task(
    task: bytes,
    arguments: dict[str, Any],
    send: Callable[[dict[str, Any]], None],
    stop_requested: threading.Event,
) -> Any:
    """Unpack and run one function; what it returns has to be JSON."""
    # The only place where something is unpickled: bytes of our own parent, over a pipe that it
    # made for this process alone.
    import cloudpickle

    from shoal.launch.context import Context

    place, function, values = cloudpickle.loads(task)
    context = Context(
        rank=arguments["rank"],
        world_size=place["world_size"],
        local_rank=arguments["rank"],
        store=arguments["store"],
        generation=place["generation"],
        threads=place["threads"],
        send=lambda message: send({"message": message}),
        stop_requested=stop_requested,
        spares=place["spares"],
    )
    return function(context, *values)


def hear_stop() -> threading.Event:
    """An event that SIGTERM sets, one that came while this process started included.

    SIGINT is the supervisor's business.
    """
    requested = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: requested.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return requested


def sender(fd: int) -> Callable[[dict[str, Any]], None]:
    """How this rank reports: one JSON object a line, from any of its threads."""
    lock = threading.Lock()

    def send(value: dict[str, Any]) -> None:
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        with lock:
            view = memoryview(line)
            while view:
                view = view[os.write(fd, view) :]

    return send


def preload(modules: Sequence[str]) -> None:
    """Import what the first task will need; what cannot be imported is that task's business.

    Without the collector of reference cycles, which looks at the growing heap again and again while
    torch is imported, for a tenth of the time. What has been imported it never looks at again.
    """
    gc.disable()
    for name in modules:
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    gc.freeze()
    gc.enable()


def leave(status: int) -> NoReturn:
    """End, with what was printed, and without destructors: a group's may wait for lost peers."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def main() -> None:
    """Run tasks until the supervisor closes the pipe, or one fails."""
    arguments = json.loads(sys.argv[1])
    die_with(arguments["parent"])
    stop_requested = hear_stop()
    # What user code starts must not hold the pipes: their end is how a rank's end is seen.
    for name in ("task_fd", "report_fd", "failure_fd"):
        os.set_inheritable(arguments[name], False)
    sys.path[:] = arguments["path"]  # a user's modules are found here as they are there
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    send = sender(arguments["report_fd"])
    preload(arguments["preload"])
    with open(arguments["task_fd"], "rb") as tasks:  # noqa: PTH123 (a descriptor, not a path)
        while (task := read_task(tasks)) is not None:
            try:
                result = run_task(task, arguments, send, stop_requested)
                # Before the result is told: what is asked from then on is for the next task.
                stop_requested.clear()
                send({"result": result})
            except BaseException as error:
                last_words(arguments["failure_fd"], arguments["rank"], error)
                leave(1)
    leave(0)


if __name__ == "__main__":
    main()
