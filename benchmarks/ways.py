"""The ways of doing a workload: with Shoal, by hand, with each peer. Each call is one whole run.

    shoal(WORKLOADS["small-resnet"], "dp2")()      # {"samples_per_second": 540.1, …} or why not
    by_hand(WORKLOADS["small-resnet"], ranks=2)()

Rates are of the steps after the warm-up. Shoal's are from the lines of its log, which have the
samples and the seconds so far; evaluation and checkpoint come after the last of them.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import sidebyside
from sidebyside import ROOT, Result, Way, cores
from workloads import HERE, Workload

PEERS = Path(os.environ.get("BENCH_PEERS_PYTHON", HERE / ".venv" / "bin" / "python"))
TRYING_STEPS = 75
UNDER_TORCHRUN = ("ddp", "tuned_ddp", "accelerated", "zero1")


def shortened(workload: Workload, share: float) -> Workload:
    """A workload of fewer steps, with a step after the warm-up at least."""
    warmup = max(1, round(workload.warmup * share))
    return replace(workload, warmup=warmup, steps=max(warmup + 1, round(workload.steps * share)))


def shoal(workload: Workload, strategy: str, *changes: str, peaks: bool = False) -> Way:
    """`shoal train` of the workload's recipe."""

    def way() -> Result:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [sys.executable, "-m", "shoal", "train", str(workload.recipe), "--json",
                       "--strategy", strategy, "--out", str(out)]  # fmt: skip
            for change in (f"steps={workload.steps}", *changes):
                command += ["--set", change]
            with _First(out / "metrics.jsonl") as first:
                document = sidebyside.run(command, peaks=peaks).document()
            if isinstance(document, str):
                return document
            rate = _rate_after(out / "metrics.jsonl", workload.warmup)
            accuracy = document["metrics"].get("accuracy")
            more = {"seconds_to_first_step": first.seconds, "accuracy": accuracy}
            return {**document, **more, "samples_per_second": rate}

    return way


@functools.cache
def let_auto_try(workload: Workload, strategy: str) -> None:
    """`auto` tries numerics in the first run that is long enough, and remembers what it finds."""
    if strategy.startswith("auto"):
        shoal(workload, strategy, f"steps={TRYING_STEPS}")()


def by_hand(
    workload: Workload,
    *options: str,
    ranks: int = 1,
    torchrun: bool = False,
    peaks: bool = False,
) -> Way:
    """The hand-written loop of `by_hand.py`, with the cores shared out over the ranks."""
    threads = max(1, cores() // ranks)
    line = [str(HERE / "by_hand.py"), *_steps(workload), *options]

    def way() -> Result:
        with tempfile.TemporaryDirectory() as folder:
            if torchrun:
                command = [sys.executable, *_torchrun(ranks), *line]
            elif ranks > 1:
                command = [sys.executable, "-c", _START, *line]
                command += ["--ranks", str(ranks), "--store", f"{folder}/store"]
            else:
                command = [sys.executable, *line]
            return sidebyside.run(command, threads=threads, peaks=peaks, **_imports()).document()

    return way


def peer(workload: Workload, name: str) -> Way:
    """A peer's script in `benchmarks/peers`, with what that tool sets by default."""
    launcher = _torchrun(2) if name in UNDER_TORCHRUN else []
    command = [str(PEERS), *launcher, str(HERE / "peers" / f"{name}.py"), *_steps(workload)]

    def way() -> Result:
        if not PEERS.exists():
            return "the peers' environment is not there: `make bench` makes it"
        path = f"{PEERS.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return sidebyside.run(command, PATH=path, BENCH_ROOT=str(ROOT), **_imports()).document()

    return way


def peer_versions() -> str:
    """The versions in the peers' environment."""
    names = ["torch", "accelerate", "lightning-fabric", "deepspeed", "ray"]
    script = "import sys, importlib.metadata as m\nfor n in sys.argv[1:]: print(n, m.version(n))"
    if not PEERS.exists():
        return "not there"
    done = subprocess.run([PEERS, "-c", script, *names], capture_output=True, text=True)
    return ", ".join(done.stdout.split("\n")[:-1])


# Ranks started without a launcher: nothing but processes that meet in a file.
_START = """
import subprocess, sys
ranks = int(sys.argv[sys.argv.index("--ranks") + 1])
command = [sys.executable, *sys.argv[1:], "--rank"]
started = [subprocess.Popen([*command, str(rank)]) for rank in range(ranks)]
sys.exit(max(abs(one.wait()) for one in started))
"""


def _steps(workload: Workload) -> list[str]:
    return [workload.name, "--steps", str(workload.steps), "--warmup", str(workload.warmup)]


def _torchrun(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def _imports() -> dict[str, str]:
    """The benchmarks' own modules, beside Shoal's sources."""
    before = os.environ.get("PYTHONPATH")
    path = [str(ROOT / "src"), str(HERE), *([before] if before else [])]
    return {"PYTHONPATH": os.pathsep.join(path)}


def _rate_after(log: Path, warmup: int) -> float:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [line for line in lines if "evaluation" not in line and line["step"] >= warmup]
    first, last = steps[0], steps[-1]
    return float((last["samples"] - first["samples"]) / (last["seconds"] - first["seconds"]))


class _First:
    """Seconds from entering to a file's first line, seen within 2 ms."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: float | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "_First":
        self._started = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            if self._path.exists() and self._path.stat().st_size:
                self.seconds = time.perf_counter() - self._started
                return
