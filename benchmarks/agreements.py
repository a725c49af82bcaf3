"""What agreeing less often is worth where one of two workers is slower than the other.

    python benchmarks/agreements.py [--rounds 3] [--times 4]

    samples/s, and the loss at equal time       sync · async:1 · async:2 · async:4 · local:8
    equal workers                               sync · async:2

Each a run of its own through `shoal train` (two ranks, one thread each, a ResNet-18 of width 16 on
Fashion-MNIST), round after round. The slow worker is made so by `slowed.py`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import sidebyside
from sidebyside import spread, table

HERE = Path(__file__).parent
STEPS = 100
# At three times this rate sync learns faster and async:2 does not: LOG.md has the other rates.
LR = 0.001
SLOW = ("dp2", "dp2/async:1", "dp2/async:2", "dp2/async:4", "dp2/local:8")
EQUAL = ("dp2", "dp2/async:2")
RECIPE = """
name: slowed
batch_size: {batch}
steps: {steps}
precision: float32
model: {{name: "slowed:resnet", times: {times}}}
data: {{train: "fashion-mnist:train", evaluate: "fashion-mnist:test"}}
objective: cross_entropy
optimizer: {{name: adamw, lr: {lr}}}
evaluate: {{every: "{steps} steps"}}
checkpoint: {{every: "{steps} steps"}}
"""


def measure(rounds: int, share: float = 1.0, times: float = 4.0) -> str:
    """The section of the results page."""
    steps = max(10, round(STEPS * share))
    slow = run_all(SLOW, rounds, steps, times)
    equal = run_all(EQUAL, rounds, steps, 1.0)
    about = (
        "## One worker slower than the other\n\n"
        f"ResNet-18 of width 16 with group norm on Fashion-MNIST, AdamW at {LR:g}, {steps} steps, "
        f"2 ranks × 1 thread, {rounds} rounds, interleaved. In the first table (batches of 64) one "
        f"rank is {times:g} times slower; in the second (128) both are equal. The loss is the mean "
        "over the last eighth of the time that the quickest took. "
        "Goals: `async:2` 1.8 times the samples of `dp2`; 0.95 with equal workers."
    )
    return "\n\n".join([about, _table(slow), "Equal workers:", _table(equal)])


def run_all(
    strategies: tuple[str, ...], rounds: int, steps: int, times: float
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {strategy: [] for strategy in strategies}
    for _ in range(rounds):
        for strategy in strategies:
            found[strategy].append(run_once(strategy, steps, times))
            rate = found[strategy][-1]["rate"]
            print(f"  times {times:g}: {strategy}: {rate:.1f}/s", file=sys.stderr, flush=True)
    return found


def run_once(strategy: str, steps: int, times: float) -> dict[str, Any]:
    """Samples a second, and (seconds, loss) of each step."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        recipe = Path(folder) / "slowed.yaml"
        recipe.write_text(
            RECIPE.format(steps=steps, times=times, lr=LR, batch=64 if times > 1 else 128),
            encoding="utf-8",
        )
        environment = sidebyside.environment(1)
        environment["PYTHONPATH"] = f"{HERE}:{environment['PYTHONPATH']}"
        command = [sys.executable, "-m", "shoal", "train", str(recipe), "--json"]
        command += ["--strategy", strategy, "--out", f"{folder}/run"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        document = json.loads(done.stdout)
        log = Path(folder, "run/metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in log.splitlines()]
    curve = [(line["seconds"], line["loss"]) for line in lines if "loss" in line]
    first, last = curve[0], curve[-1]
    # Without the first step, which warms up.
    rate = (last_samples(lines) - first_samples(lines)) / (last[0] - first[0])
    return {"rate": rate, "curve": curve, "accuracy": document["metrics"]["accuracy"]}


def first_samples(lines: list[Any]) -> float:
    return float(next(line["samples"] for line in lines if "loss" in line))


def last_samples(lines: list[Any]) -> float:
    return float([line["samples"] for line in lines if "loss" in line][-1])


def _table(found: dict[str, list[Any]]) -> str:
    reference = next(iter(found))
    rows = []
    for strategy, runs in found.items():
        ratios = [a["rate"] / b["rate"] for a, b in zip(runs, found[reference], strict=True)]
        losses = [
            _loss_at(run, min(each["curve"][-1][0] for each in of_round))
            for run, of_round in zip(runs, zip(*found.values(), strict=True), strict=True)
        ]
        rows.append([f"`{strategy}`", spread([run["rate"] for run in runs], 1),
                     f"**{spread(ratios)}**", spread(losses, 3),
                     spread([run["accuracy"] for run in runs], 3)])  # fmt: skip
    return table(["", "samples/s", f"÷ {reference}", "loss at equal time", "accuracy"], rows)


def _loss_at(run: dict[str, Any], seconds: float) -> float:
    """The mean loss over the eighth of the time before `seconds`."""
    near = [loss for at, loss in run["curve"] if 0.875 * seconds <= at <= seconds]
    return statistics.fmean(near) if near else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=float, default=4.0)
    parser.add_argument("--share", type=float, default=1.0)
    given = parser.parse_args()
    print(measure(given.rounds, given.share, given.times))


if __name__ == "__main__":
    main()
