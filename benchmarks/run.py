"""Run every benchmark, one after another, and write one dated page of results.

    python benchmarks/run.py [--rounds 5]

Ratios are measured side by side in one run, interleaved; medians, with the smallest and largest.
"""

import argparse
import datetime
import os
import platform
from pathlib import Path

import torch

import data_parallel

RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The processor's name and how many cores this process may use."""
    cores = len(os.sched_getaffinity(0))
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {cores} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    rounds = parser.parse_args().rounds
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    head = [
        f"# {today}: {processor()}",
        "",
        f"torch {torch.__version__}, Python {platform.python_version()}, {rounds} rounds.",
        "",
    ]
    page = "\n".join([*head, data_parallel.measure(rounds)])
    RESULTS.mkdir(exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    path = RESULTS / f"{today}-cpu-{cores}-cores.md"
    path.write_text(page + "\n", encoding="utf-8")
    print(page)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
