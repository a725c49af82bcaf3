"""A rank: reads functions from an inherited pipe, runs them, reports in JSON.

    python -m shoal.launch.worker '{"rank": 0, "parent": 4711, "task_fd": 5, …}'
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

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
    from shoal.errors import PeerLost, RunError, ShoalError

    text = "".join(traceback.format_exception(error))
    if not isinstance(error, ShoalError):
        described = RunError(f"{type(error).__name__}: {error}", hint=_place(error))
        described.traceback = text
        error = described
    error.located(rank=rank)
    error.traceback = error.traceback or text
    words = {
        "time": time.monotonic(),
        "secondary": isinstance(error, PeerLost),
        "error": error.to_json(),
    }
    os.pwrite(fd, json.dumps(words).encode(), 0)


def _place(error: BaseException) -> str | None:
    frames = traceback.extract_tb(error.__traceback__)
    return f"in {frames[-1].filename}:{frames[-1].lineno}" if frames else None


def run_task(task: bytes, arguments: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> Any:
    """Unpack and run one function; what it returns has to be JSON."""
    # The only place where something is unpickled: bytes of our own parent, over a pipe that it
    # made for this process alone.
    import cloudpickle

    from shoal.launch.context import Context, listen_for_stop

    flag = threading.Event()
    listen_for_stop(flag)
    if arguments["stopped"]:
        flag.set()
    place, function, values = cloudpickle.loads(task)  # noqa: S301
    context = Context(
        rank=arguments["rank"],
        world_size=place["world_size"],
        local_rank=arguments["rank"],
        store=arguments["store"],
        generation=place["generation"],
        threads=place["threads"],
        send=lambda message: send({"message": message}),
        stop_requested=flag,
    )
    return function(context, *values)


def main() -> None:
    arguments = json.loads(sys.argv[1])
    die_with(arguments["parent"])
    early_stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: early_stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    report_lock = threading.Lock()

    def send(value: dict[str, Any]) -> None:
        line = json.dumps(value, separators=(",", ":")).encode() + b"\n"
        with report_lock:
            view = memoryview(line)
            while view:
                view = view[os.write(arguments["report_fd"], view) :]

    with open(arguments["task_fd"], "rb") as tasks:  # noqa: PTH123 (a descriptor, not a path)
        while (task := read_task(tasks)) is not None:
            try:
                arguments["stopped"] = early_stop.is_set()
                send({"result": run_task(task, arguments, send)})
            except BaseException as error:
                last_words(arguments["failure_fd"], arguments["rank"], error)
                sys.stderr.flush()
                # No destructors: a group's may wait for peers that will never answer.
                os._exit(1)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
