"""How much memory does a rank need, and what does it cost: dp2 beside what cuts the model?

    python benchmarks/memory.py [--rounds 1]

A GPT of 85 million parameters (`gpt.py`: 12 layers of 768), batches of 8 times 128 tokens, AdamW,
through `shoal train` as it is. The peak is the contract's: highest resident size since the rank
began with the run, in MiB, the larger one of the two ranks. The copy that a checkpoint is written
from is in it. Each figure is beside that of dp2 in the same round; dp2 a second time with memory
given back at once, as the others do it, tells what that alone is worth.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

import sidebyside
from sidebyside import RATE, Result, Way
from workloads import DATA, HERE

STRATEGIES = ("dp2", "dp2/zero1", "dp2/zero2", "dp2/zero3", "dp2/zero3+recompute", "tp2", "pp2")
COMPACT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
GIVEN_BACK = "dp2, memory given back"
VOCABULARIES = {256: STRATEGIES, 50_257: ("dp2", "dp2/zero3")}
STEPS = 3


def prepare(vocab: int) -> Path:
    """Random tokens: what they are makes no difference."""
    DATA.mkdir(exist_ok=True)
    path = DATA / f"gpt-{vocab}.npz"
    if not path.exists():
        made = np.random.default_rng(0)
        np.savez(path, inputs=made.integers(0, vocab, (64, 128)), targets=np.zeros(64, np.int64))
    return path


def way(strategy: str, vocab: int, **variables: str) -> Way:
    """A run of `STEPS` steps; its peak in MiB and the rate of all steps but the first."""

    def run() -> Result:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "shoal", "train", str(HERE / "recipes/gpt.yaml")]
            command += ["--json", "--strategy", strategy, "--out", f"{folder}/run"]
            for change in (
                f"steps={STEPS}",
                f"data.train={prepare(vocab)}",
                f"model.vocab={vocab}",
            ):
                command += ["--set", change]
            path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
            document = sidebyside.run(command, PYTHONPATH=path, **variables).document()
        if isinstance(document, str):
            return document
        peak = max(document["peak_memory_bytes"]) / (1 << 20)
        step = document["timings"]["step"] / STEPS
        return {"peak": peak, RATE: 8 / step}

    return run


def measure(rounds: int) -> str:
    """The section of the results page."""
    lines = ["## Memory of a rank", "", (__doc__ or "").split("\n\n", 2)[2].strip()]
    for vocab, strategies in VOCABULARIES.items():
        ways = {name: way(name, vocab) for name in strategies}
        ways[GIVEN_BACK] = way("dp2", vocab, **COMPACT)
        results = sidebyside.interleaved(ways, rounds)
        lines += ["", f"### Vocabulary of {vocab:,}, tied", "", _table(results)]
    return "\n".join(lines)


def _table(results: dict[str, list[Result]]) -> str:
    rows = []
    for name, found in results.items():
        if (reason := sidebyside.reason(found)) is not None:
            rows.append([name, f"not measured: {reason.splitlines()[0]}", "", ""])
            continue
        rows.append(
            [
                name,
                sidebyside.spread(sidebyside.values(found, "peak"), 0),
                sidebyside.spread(sidebyside.ratios(found, results["dp2"], "peak")),
                sidebyside.spread(sidebyside.ratios(found, results["dp2"])),
            ]
        )
    return sidebyside.table(["", "peak, MiB", "÷ dp2", "samples/s ÷ dp2"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="how often each is measured")
    print(measure(parser.parse_args().rounds))
