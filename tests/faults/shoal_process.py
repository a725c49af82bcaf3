"""Shoal as a user runs it: real processes, looked at from outside.

shoal = Shoal(folder)
done = shoal.run("train", "tiny.yaml", "--strategy", "dp2", "--out", "run")
done.status, done.document, done.errors

running = shoal.start("train", …)
running.wait_for_step(3)
running.process.send_signal(signal.SIGTERM)
done = running.finish()
"""

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]

# Models that give a test the time to act in the middle of a run.
SLOW = '''
import pathlib
import time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self, seconds, hold_at=None):
        super().__init__()
        self.linear = nn.Linear(36, 3)
        self.seconds, self.hold_at, self.calls = seconds, hold_at, 0

    def forward(self, x):
        time.sleep(self.seconds)
        self.calls += 1
        while self.calls == self.hold_at and pathlib.Path("hold").exists():
            time.sleep(0.01)
        return self.linear(x.flatten(1))

def build(seconds=0.05):
    return Slow(seconds)

def held(at):
    """Waits in its `at`-th step while there is a file `hold`."""
    return Slow(0, at)
'''
RECIPE = """
name: tiny
batch_size: 12
steps: 12
model: {name: mlp, widths: [8]}
data: {train: ./images}
objective: cross_entropy
optimizer: {name: sgd, lr: 0.1, momentum: 0.9}
evaluate: {every: 100 steps}
checkpoint: {every: 4 steps, keep: 2}
"""


def write_images(folder, train=48, test=20):
    """Images of 6×6 pixels in three classes, easy to tell apart, as IDX files."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for prefix, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 3).astype(np.uint8)
        pixels = random.integers(0, 60, (count, 6, 6)).astype(np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[2 * label : 2 * label + 2] += 150
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 6, 6)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = struct.pack(">4BI", 0, 0, 8, 1, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


class Done:
    """What a finished command has left."""

    def __init__(self, status, output, errors, seconds):
        self.status = status
        self.output = output
        self.errors = errors
        self.seconds = seconds

    @property
    def document(self):
        """Standard output, which is one JSON document and nothing else."""
        return json.loads(self.output)

    def __repr__(self):
        return f"status {self.status} in {self.seconds:.1f} s\n{self.output}\n{self.errors}"


class Running:
    """A command that is running."""

    def __init__(self, process, folder):
        self.process = process
        self.folder = folder
        self._started = time.monotonic()

    def wait_until(self, what, timeout_s=60):
        """Wait for `what()` to be true, while the command runs."""
        deadline = time.monotonic() + timeout_s
        while not (value := what()):
            assert self.process.poll() is None, f"it ended first: {self.finish()!r}"
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)
        return value

    def wait_for_step(self, step, run="run"):
        file = self.folder / run / "metrics.jsonl"
        self.wait_until(lambda: f'"step": {step},' in read(file))

    def wait_for_checkpoint(self, step, run="run"):
        """A save goes on beside training: it may be there some steps later."""
        path = self.folder / run / f"checkpoints/step-{step:09d}"
        self.wait_until(path.exists)

    def wait_for_ranks(self, count):
        return self.wait_until(lambda: (found := self.ranks()) if len(self.ranks()) == count else 0)

    def ranks(self):
        """The process ids of the ranks, by rank."""
        found = {}
        for process in children(self.process.pid):
            arguments = read(Path(f"/proc/{process}/cmdline")).split("\0")
            if "shoal.launch.worker" in arguments:
                found[json.loads(arguments[-2])["rank"]] = process
        return [found[rank] for rank in sorted(found)]

    def finish(self, timeout_s=60):
        output, errors = self.process.communicate(timeout=timeout_s)
        return Done(self.process.returncode, output, errors, time.monotonic() - self._started)


class Shoal:
    """The command, in a folder with a small recipe and its data."""

    def __init__(self, folder):
        self.folder = folder
        self.started = []
        (folder / "tiny.yaml").write_text(RECIPE)
        (folder / "slow.py").write_text(SLOW)
        write_images(folder / "images")

    def start(self, *arguments, command=(sys.executable, "-m", "shoal"), **environment):
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,
        )
        running = Running(process, self.folder)
        self.started.append(running)
        return running

    def run(self, *arguments, timeout_s=90, **options):
        return self.start(*arguments, **options).finish(timeout_s)

    def train(self, *arguments, recipe="tiny.yaml", out="run", **options):
        """`shoal train tiny.yaml --out run --json …` to its end."""
        return self.run("train", recipe, "--out", out, "--json", *arguments, **options)

    def start_training(self, *arguments, recipe="tiny.yaml", out="run", **options):
        return self.start("train", recipe, "--out", out, "--json", *arguments, **options)

    def summary(self, run="run"):
        return json.loads((self.folder / run / "run.json").read_text())

    def lines(self, name, run="run"):
        return [json.loads(line) for line in read(self.folder / run / name).splitlines()]

    def checkpoints(self, run="run"):
        return sorted(path.name for path in (self.folder / run / "checkpoints").iterdir())

    def close(self):
        for running in self.started:
            if running.process.poll() is None:
                for process in [running.process.pid, *children(running.process.pid)]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            running.process.communicate()


def read(path):
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def children(process):
    found = read(Path(f"/proc/{process}/task/{process}/children")).split()
    return [int(child) for child in found]


def alive(process):
    """Whether a process runs; one that has ended and is not yet waited for does not."""
    state = read(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()
    return bool(state) and state[0] != "Z"


def gone_within(processes, seconds):
    """Whether all of these end in time."""
    deadline = time.monotonic() + seconds
    while any(alive(process) for process in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def weights(folder, step):
    """Every tensor of a checkpoint, by name."""
    from shoal.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder / "checkpoints" / f"step-{step:09d}")
    checkpoint.verify()
    return {name: checkpoint.read(name) for name in checkpoint.names}


def equal(left, right):
    """Whether two sets of tensors have the same names and bits."""
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)
