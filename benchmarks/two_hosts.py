"""What agreeing less often is worth between two hosts that a slow network joins.

    python benchmarks/two_hosts.py [--rounds 1] [--rate 100mbit] [--only resnet,gpt,payload]

    samples/s, bytes sent, time to the loss that `dp2` ends with      each ÷ dp2
    payload of 64 steps: diloco:64:wire=int8 ÷ dp2

Two network namespaces on this machine (`namespaces.py`), a rank of one thread in each, started as
torchrun starts them, over gloo. The clock stands while the loss is evaluated, which is measuring,
not training; replicas that are apart are evaluated where they meet anyway.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import sidebyside
import workloads
from namespaces import missing, run_ranks, two_hosts
from sidebyside import spread, table
from workloads import DATA, HERE

RATE = "100mbit"
LENGTH = 64
AGREEMENT = ("gradient", "parameter", "agreement")
ROUND = 64  # steps
NEAR = 1.01  # of the loss that `dp2` ends with, for all: 1 % is below what a seed changes
GOAL_TIME, GOAL_PAYLOAD = 10, 250


@dataclass(frozen=True)
class Way:
    """A strategy, for how many steps, evaluated how often, and what its recipe has else."""

    strategy: str
    steps: int
    every: int
    more: tuple[str, ...] = ()


PLAIN = "lr=1:momentum=0"  # the outer step of local SGD: what a few rounds can use
JOBS = {
    "resnet": (
        Way("dp2", 40, 8),
        Way("dp2/local:16", 64, 16),
        Way(f"dp2/diloco:8:{PLAIN}:wire=int8", 48, 8),
        Way(f"dp2/diloco:16:{PLAIN}:wire=int8", 64, 16),
        Way(f"dp2/diloco:64:{PLAIN}:wire=int8", 128, 64),
        Way("dp2/compress:powersgd=8", 48, 8),
    ),
    "gpt": (
        Way("dp2", 40, 8),
        Way("dp2/local:16", 64, 16),
        Way(f"dp2/diloco:8:{PLAIN}:wire=int8", 48, 8),
        Way(f"dp2/diloco:16:{PLAIN}:wire=int8", 64, 16),
        Way(f"dp2/diloco:64:{PLAIN}:wire=int8", 64, 64),
        Way("dp2/compress:powersgd=8", 48, 8),
    ),
}


@dataclass
class Result:
    """One run. ``curve``: (seconds of training, loss on held-out data)."""

    rate: float
    curve: list[tuple[float, float]]
    payload: int
    sent: int
    steps: int
    parameters: int = 0
    accuracy: float | None = None
    losses: list[float] = field(default_factory=list)

    def seconds_to(self, loss: float) -> float:
        """When it was first as good as that; infinite if never."""
        return next((at for at, reached in self.curve if reached <= loss), float("inf"))


def measure(rounds: int, share: float = 1.0) -> str:
    """The section of the results page."""
    reason = missing()
    if reason is not None:
        return f"{TITLE}\n\nSkipped: {reason}."
    prepare()
    parts = [about(rounds)]
    parts += [job(name, rounds, share) for name in JOBS]
    return "\n\n".join([*parts, payload()])


TITLE = "## Two hosts, 100 Mbit/s between them"


def about(rounds: int) -> str:
    return (
        f"{TITLE}\n\n"
        "Two network namespaces, a veth pair, `tc … tbf rate 100mbit` on both ends; 2 ranks × 1 "
        f"thread, gloo over TCP, {rounds} round(s), interleaved. Loss on held-out data. Bytes are "
        "those of rank 0: its payload as `run.json` counts it (gradients, weights, agreement), "
        "and what has left through the interface in the whole run, start-up, evaluation and "
        f"headers included. Each run has a cosine of its own "
        "length. Goal: {GOAL_TIME} times sooner at the loss of `dp2` for the best."
    )


def prepare() -> None:
    """Make the data that are not there yet: bytes of film reviews, cut into pieces."""
    workloads.prepare()
    path = DATA / "two-hosts-gpt.npz"
    if path.exists():
        return
    text = workloads._reviews_text().decode("latin-1")
    lines = [line.split("\t", 2)[2] for line in text.splitlines()]
    found = {}
    for prefix, part in (
        ("", [line for place, line in enumerate(lines) if place % 20]),
        ("evaluate_", lines[::20]),
    ):
        whole = np.frombuffer("\n".join(part).encode("latin-1"), dtype=np.uint8)
        rows = whole[: len(whole) // LENGTH * LENGTH].reshape(-1, LENGTH).astype(np.int64)
        rows = rows if not prefix else rows[:256]
        found |= {f"{prefix}inputs": rows, f"{prefix}targets": np.zeros(len(rows), np.int64)}
    np.savez(path.with_suffix(".part.npz"), **found)
    path.with_suffix(".part.npz").rename(path)


def job(name: str, rounds: int, share: float = 1.0, rate: str = RATE) -> str:
    """The table of one job."""
    ways = JOBS[name]
    results: dict[Way, list[Result]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            found = run_once(name, way, rate, share)
            results[way].append(found)
            curve = ", ".join(f"{loss:.3f} at {at:.1f} s" for at, loss in found.curve)
            print(f"  {name} {way.strategy}: {found.rate:.1f}/s; {curve}", file=sys.stderr)
    return f"{_head(name, results)}\n\n{_table(results)}"


def run_once(name: str, way: Way, rate: str | None, share: float = 1.0) -> Result:
    """Train once between two hosts."""
    steps = max(way.every, round(way.steps * share / way.every) * way.every)
    environment = sidebyside.environment(1)
    del environment["GLOO_SOCKET_IFNAME"]  # it is lo's: Shoal finds the way to the other host
    environment["PYTHONPATH"] = f"{HERE}:{environment['PYTHONPATH']}"
    environment["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    recipe = HERE / "recipes" / f"two-hosts-{name}.yaml"
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, two_hosts(rate) as hosts:
        command = [sys.executable, "-m", "shoal", "train", str(recipe), "--json", "--comm", "gloo"]
        command += ["--strategy", way.strategy, "--out", f"{folder}/run"]
        for change in (f"steps={steps}", f"evaluate.every={way.every} steps", *way.more):
            command += ["--set", change]
        ended = run_ranks(hosts, command, environment, cwd=sidebyside.ROOT)
        for one in ended:
            if one.status:
                raise RuntimeError(f"{way.strategy}: {one.errors[-2000:]}")
        sent = hosts[0].sent()
        document = json.loads(ended[0].output)
        log = Path(folder, "run/metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    return _result(lines, document, sent)


def _result(lines: Sequence[dict[str, Any]], document: dict[str, Any], sent: int) -> Result:
    stood, clock = 0.0, 0.0
    times: list[tuple[float, int]] = []
    curve, losses = [], []
    for line in lines:
        if "evaluation" in line:
            stood += line["seconds"] - clock
            curve.append((times[-1][0], line["evaluation"]["loss"]))
        else:
            times.append((line["seconds"] - stood, line["samples"]))
            losses.append(line["loss"])
        clock = line["seconds"]
    (first_s, first), (last_s, last) = times[0], times[-1]
    return Result(
        rate=(last - first) / (last_s - first_s),
        curve=curve,
        payload=_payload(document),
        sent=sent,
        steps=document["steps"],
        accuracy=document["metrics"].get("accuracy"),
        losses=losses,
    )


def _payload(document: dict[str, Any]) -> int:
    """Bytes that rank 0 has given to the collectives of the agreement."""
    return sum(
        ranks[0]
        for purposes in document["comm_bytes"].values()
        for purpose, ranks in purposes.items()
        if purpose in AGREEMENT
    )


def _head(name: str, results: dict[Way, list[Result]]) -> str:
    sync = next(iter(results.values()))
    about = {
        "resnet": "ResNet-18, 11.2 million parameters, on Fashion-MNIST at 8×8, batches of 64, SGD",
        "gpt": "GPT, 10.8 million parameters, the next byte of film reviews, batches of 4 × 64, "
        "AdamW",
    }
    loss = spread([one.curve[-1][1] for one in sync], 3)
    return (
        f"{about[name]}. `dp2` ends with a loss of {loss} after "
        f"{sync[0].steps} steps; measured is the time to 1.01 of it."
    )


def _table(results: dict[Way, list[Result]]) -> str:
    sync = next(iter(results.values()))
    rows = []
    for way, runs in results.items():
        pairs = list(zip(runs, sync, strict=True))
        wanted = [NEAR * base.curve[-1][1] for base in sync]
        times = [one.seconds_to(loss) for one, loss in zip(runs, wanted, strict=True)]
        gains = [
            base.seconds_to(loss) / time
            for time, loss, base in zip(times, wanted, sync, strict=True)
        ]
        rows.append(
            [
                f"`{way.strategy}`" + "".join(f", {change}" for change in way.more),
                spread([one.rate for one in runs], 1),
                f"{spread([one.rate / base.rate for one, base in pairs], 1)}",
                _step_bytes([one.payload / one.steps for one in runs]),
                _step_bytes([one.sent / one.steps for one in runs]),
                spread(times, 1),
                f"**{spread(gains, 1)}**",
                f"{spread([one.curve[-1][1] for one in runs], 3)} at {runs[0].steps}",
            ]
        )
    head = ["", "samples/s", "÷ dp2", "payload a step, MB", "sent a step, MB",
            "s to that loss", "times sooner", "loss at the end, at step"]  # fmt: skip
    return table(head, rows)


def _step_bytes(counts: Sequence[float]) -> str:
    return f"{statistics.median(counts) / 1e6:.3f}"


def payload() -> str:
    """Whole outer rounds, without a limit on the rate: bytes do not depend on it."""
    rows = []
    for name in JOBS:
        counts = {}
        for strategy in ("dp2", f"dp2/diloco:{ROUND}:wire=int8"):
            counts[strategy] = run_once(name, Way(strategy, ROUND, ROUND), None)
            print(f"  {name} {strategy}: {counts[strategy].payload} bytes", file=sys.stderr)
        sync, diloco = counts.values()
        rows.append([name, f"{sync.payload:,}", f"{diloco.payload:,}",
                     f"**{sync.payload / diloco.payload:.1f}**",
                     f"{sync.sent / diloco.sent:.1f}"])  # fmt: skip
    head = ["", "`dp2`: payload, bytes", f"`diloco:{ROUND}:wire=int8`", "times less",
            "times less through the interface"]  # fmt: skip
    return (
        f"Payload of agreement of {ROUND} steps, rank 0. Goal: {GOAL_PAYLOAD} times less.\n\n"
        + table(head, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps: a quick look")
    parser.add_argument("--rate", default=RATE, help="of the link, as tc reads it")
    parser.add_argument("--only", default=",".join([*JOBS, "payload"]))
    parser.add_argument("--ways", type=int, nargs="*", help="numbers of a job's ways")
    given = parser.parse_args()
    reason = missing()
    if reason is not None:
        raise SystemExit(f"skipped: {reason}")
    prepare()
    if given.ways:
        for name, ways in JOBS.items():
            JOBS[name] = tuple(ways[number] for number in given.ways if number < len(ways))
    for name in given.only.split(","):
        found = payload() if name == "payload" else job(name, given.rounds, given.share, given.rate)
        print(found, flush=True)


if __name__ == "__main__":
    main()
