"""Measure several ways of doing the same work side by side: in turn, round after round.

round 1    a  b  c         a ratio is that of one round, so what slows the whole machine for a
round 2    a  b  c         while slows both of its sides; reported are the median of the rounds'
round 3    a  b  c         ratios, the smallest and the largest

results = interleaved({"by hand": by_hand, "shoal": shoal}, rounds=3)
spread(ratios(results["shoal"], results["by hand"], RATE))     # "1.04 (1.01 to 1.07)"
"""

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RATE = "samples_per_second"
STARTED = "BENCH_STARTED"  # in a child's environment: when it was started, seconds since 1970
TIMEOUT_S = 900.0

Document = dict[str, Any]
Result = Document | str
"""What a way measured; or, as text, why it did not run."""
Way = Callable[[], Result]


def interleaved(ways: Mapping[str, Way], rounds: int) -> dict[str, list[Result]]:
    """Each way once a round. One that does not run is not tried again."""
    results: dict[str, list[Result]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            done = results[name]
            failed = bool(done) and isinstance(done[-1], str)
            done.append(done[-1] if failed else way())
            said = done[-1] if isinstance(done[-1], str) else f"{done[-1].get(RATE, 0):.1f}/s"
            print(f"  round {number + 1}: {name}: {said}", file=sys.stderr, flush=True)
    return results


def values(results: Sequence[Result], key: str) -> list[float]:
    """A figure of each round; none of a way that did not run."""
    return [float(one[key]) for one in results if isinstance(one, dict) and one.get(key)]


def ratios(mine: Sequence[Result], others: Sequence[Result], key: str = RATE) -> list[float]:
    """Mine ÷ the other's, round by round, where both have run."""
    return [
        one[key] / other[key]
        for one, other in zip(mine, others, strict=True)
        if isinstance(one, dict) and isinstance(other, dict) and one.get(key) and other.get(key)
    ]


def reason(results: Sequence[Result]) -> str | None:
    """Why a way did not run; None if it did."""
    return next((one for one in results if isinstance(one, str)), None)


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """`median (smallest to largest)`."""
    if not numbers:
        return "–"
    middle, low, high = statistics.median(numbers), min(numbers), max(numbers)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def geometric_mean(numbers: Sequence[float]) -> float:
    """exp(mean(log x)); NaN of nothing."""
    return statistics.geometric_mean(numbers) if numbers else float("nan")


def means_by_round(columns: Sequence[Sequence[float]]) -> list[float]:
    """The geometric mean over columns of each round; columns that lack a round are left out."""
    full = [column for column in columns if column]
    rounds = min((len(column) for column in full), default=0)
    return [geometric_mean([column[number] for column in full]) for number in range(rounds)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell or " " for cell in line) + " |" for line in lines)


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """The processor's name and how many cores this process may use."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {cores()} cores"
    return f"{platform.processor() or platform.machine()}, {cores()} cores"


def environment(threads: int | None = None) -> dict[str, str]:
    """That of a child: the checkout's Shoal, gloo on loopback, and so many threads if said."""
    ours = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    path = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours |= {"PYTHONPATH": os.pathsep.join(path), "GLOO_SOCKET_IFNAME": "lo"}
    return ours if threads is None else ours | {"OMP_NUM_THREADS": str(threads)}


@dataclass(frozen=True)
class Ended:
    """A process tree that has ended: what it printed, and the memory of its processes."""

    output: str
    errors: str
    status: int
    peaks: tuple[int, ...]

    def document(self) -> Result:
        """The document that it printed, perhaps after other lines; why there is none."""
        if self.status == 0:
            for text in (self.output, *reversed(self.output.splitlines())):
                with contextlib.suppress(ValueError):
                    found = json.loads(text)
                    if isinstance(found, dict):
                        return {**found, "peaks": self.peaks}
        said = [line.strip() for line in self.errors.splitlines() if line.strip()]
        # torchrun's own error, which comes last, says only that a rank had one.
        errors = [line for line in said if "Error" in line and "ChildFailedError" not in line]
        telling = errors or said or ["it said nothing"]
        return f"ended with status {self.status}: {telling[-1][:200]}".replace("|", "∣")


def run(
    command: Sequence[str], *, threads: int | None = None, peaks: bool = False, **more: str
) -> Ended:
    """Run a command in the checkout to its end, and leave nothing of it behind.

    ``more`` goes into its environment. ``peaks``: watch the memory of its processes.
    """
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(threads) | {STARTED: repr(time.time())} | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with _watched(started.pid, peaks) as found:
        try:
            output, errors = started.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            output, errors = "", f"Error: not done within {TIMEOUT_S:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # what a failed launcher left behind
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()
    return Ended(output, errors, started.returncode, tuple(sorted(found.values(), reverse=True)))


@contextlib.contextmanager
def _watched(pid: int, wanted: bool):
    """Highest resident bytes by process, of a process and all below it, while this is entered."""
    found: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for one in _tree(pid):
                found[one] = max(found.get(one, 0), _peak(one))

    thread = threading.Thread(target=watch)
    if wanted:
        thread.start()
    try:
        yield found
    finally:
        done.set()
        if wanted:
            thread.join()


def _tree(pid: int) -> list[int]:
    below = []
    with contextlib.suppress(OSError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            below += [int(child) for child in children.read_text().split()]
    return [pid, *(found for child in below for found in _tree(child))]


def _peak(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # since exec, unlike ru_maxrss
                return int(line.split()[1]) * 1024
    return 0
