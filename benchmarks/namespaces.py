"""Two hosts on one machine: network namespaces joined by a cable, as slow as one likes.

    with two_hosts("100mbit") as hosts:
        run_ranks(hosts, ["shoal", "train", "recipe.yaml", "-s", "dp2/local:16"], os.environ)

    namespace a  10.77.0.1 ══ veth pair, each end `tc … tbf rate 100mbit` ══ 10.77.0.2  namespace b

Files and processes are shared, each has half of the cores. Needs root and iproute2. Whatever
happens, what runs in the namespaces is killed and they are removed again.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PORT = 29501
AFTER_A_FAILURE_S = 10.0
# tbf's bucket: what 100 Mbit/s carry in 10 ms. Its queue holds 50 ms, about what a switch does.
BURST, LATENCY = "128kb", "50ms"


@dataclass(frozen=True)
class Host:
    """One namespace, and its end of the cable."""

    namespace: str
    interface: str
    address: str
    cores: tuple[int, ...] = ()

    def command(self, command: Sequence[str]) -> list[str]:
        """The command, to be run in here, on this host's cores."""
        own = ["taskset", "--cpu-list", ",".join(map(str, self.cores))] if self.cores else []
        return ["ip", "netns", "exec", self.namespace, *own, *command]

    def sent(self) -> int:
        """Bytes that have left through the cable, headers and all."""
        shown = _ip("-n", self.namespace, "-j", "-s", "link", "show", "dev", self.interface)
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    def processes(self) -> list[int]:
        return [int(one) for one in _ip("netns", "pids", self.namespace).split()]


def missing() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}`: install iproute2"
    try:
        with two_hosts("1gbit"):
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"


@contextlib.contextmanager
def two_hosts(rate: str | None = None) -> Iterator[tuple[Host, Host]]:
    """Two namespaces; `rate` as `tc` reads it, None for as fast as memory."""
    mark = f"{os.getpid():x}"
    hosts = tuple(
        Host(f"shoal-{mark}-{end}", f"sh{mark}{end}", f"10.77.0.{number}", cores)
        for number, (end, cores) in enumerate(zip("ab", _halves(), strict=True), start=1)
    )
    a, b = hosts
    _remove_what_the_dead_left()
    before = _end_on_sigterm()
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
        _ip("link", "add", a.interface, "netns", a.namespace, "type", "veth",
            "peer", "name", b.interface, "netns", b.namespace)  # fmt: skip
        for host in hosts:
            inside = ("-n", host.namespace)
            _ip(*inside, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "link", "set", host.interface, "up")
            if rate is not None:
                _run("tc", *inside, "qdisc", "add", "dev", host.interface, "root",
                     "tbf", "rate", rate, "burst", BURST, "latency", LATENCY)  # fmt: skip
        yield a, b
    finally:
        for host in hosts:
            _remove(host)
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Ended:
    """How a rank ended, and what it said."""

    status: int
    output: str
    errors: str


def run_ranks(
    hosts: Sequence[Host],
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    each: Callable[[Host], Mapping[str, str]] | None = None,
    cwd: str | Path | None = None,
    timeout_s: float = 600.0,
) -> list[Ended]:
    """One rank a host to its end, as `torchrun --nnodes 2 --nproc-per-node 1` would start them.

    ``each``: what is in the environment of one host alone.

    Once one has failed the others have ten seconds to end; what is left then is killed.
    """
    with contextlib.ExitStack() as stack:
        said = [(_scratch(stack), _scratch(stack)) for _ in hosts]
        started: list[subprocess.Popen[str]] = []
        try:
            for rank, host in enumerate(hosts):
                output, errors = said[rank]
                inside, variables = host.command(command), {**environment, **world(hosts, rank)}
                variables |= each(host) if each is not None else {}
                started.append(
                    subprocess.Popen(inside, env=variables, stdout=output, stderr=errors, cwd=cwd)
                )
            _wait(started, timeout_s)
        finally:
            for one in started:
                if one.poll() is None:
                    one.kill()
                one.wait()
        return [
            Ended(one.returncode, _read(output), _read(errors))
            for one, (output, errors) in zip(started, said, strict=True)
        ]


def _wait(started: Sequence[subprocess.Popen[str]], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and any(one.poll() is None for one in started):
        if any(one.poll() for one in started):
            deadline = min(deadline, time.monotonic() + AFTER_A_FAILURE_S)
        time.sleep(0.05)


def _scratch(stack: contextlib.ExitStack) -> IO[str]:
    return stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def world(hosts: Sequence[Host], rank: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(hosts)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": str(PORT),
    }


def _halves() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The cores of the two: half each. A rank counts those it may use, and takes them all."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    if half == 0 or shutil.which("taskset") is None:
        return (), ()
    return tuple(cores[:half]), tuple(cores[half : 2 * half])


def _end_on_sigterm() -> Any:
    """Have SIGTERM raise, so that `finally` runs; what it did before (None: another thread)."""
    if threading.current_thread() is not threading.main_thread():
        return None

    def end(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    return signal.signal(signal.SIGTERM, end)


def _remove_what_the_dead_left() -> None:
    """Namespaces whose makers were killed and could not."""
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0] if line.strip() else ""
        found = re.fullmatch(r"shoal-([0-9a-f]+)-[ab]", name)
        if found is not None and not Path(f"/proc/{int(found[1], 16)}").exists():
            _remove(Host(name, "", ""))


def _remove(host: Host) -> None:
    """Kill what runs in a namespace, then remove it and with it its end of the cable."""
    with contextlib.suppress(subprocess.CalledProcessError):
        for process in host.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        _ip("netns", "delete", host.namespace)


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
