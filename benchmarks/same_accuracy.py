"""Does every way to agree less often still learn the recipe? Fashion-MNIST, equal samples.

    python benchmarks/same_accuracy.py [--epochs 5] [--only dp2/local:8] [--results FILE]

    recipes/fashion-mnist.yaml, two ranks:      accuracy on the test images − that of `sync`

Nothing of the recipe is changed, learning rate included. Results are kept in --results as they
come, and a run that is there is not run again. Accuracies, not speeds: other programs may run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import sidebyside
from sidebyside import ROOT, table

RECIPE = ROOT / "recipes" / "fashion-mnist.yaml"
REFERENCE = "dp2"
MEMBERS = (
    "dp2/async:1",
    "dp2/async:2",
    "dp2/local:8",
    "dp2/diloco:16",
    "dp2/diloco:16:wire=int8",
    "dp2/easgd:8",
    "dp2/gossip:ring",
    "dp2/gossip:exponential",
    "dp2/compress:bf16",
    "dp2/compress:powersgd=2",
    "dp2/compress:topk=10",
    "dp2/solo",
)
EPOCHS = 5


def measure(rounds: int, share: float = 1.0) -> str:
    """The section of the results page. Once, whatever ``rounds``: the seed is the recipe's."""
    del rounds
    epochs = max(1, round(EPOCHS * share))
    return page({name: run_once(name, epochs) for name in (REFERENCE, *MEMBERS)}, epochs)


def run_once(strategy: str, epochs: int) -> dict[str, Any]:
    """Accuracy, bytes sent by a rank and samples a second."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        command = [sys.executable, "-m", "shoal", "train", str(RECIPE), "--json"]
        command += ["--strategy", strategy, "--set", f"epochs={epochs}", "--out", f"{folder}/run"]
        done = subprocess.run(
            command, env=sidebyside.environment(1), capture_output=True, text=True, check=False
        )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    document = json.loads(done.stdout)
    sent = sum(
        ranks[0] for purposes in document["comm_bytes"].values() for ranks in purposes.values()
    )
    print(f"  {strategy}: {document['metrics']['accuracy']:.4f}", file=sys.stderr, flush=True)
    metrics = document["metrics"]
    return {"accuracy": metrics["accuracy"], "loss": metrics["loss"], "sent": sent}


def page(found: dict[str, dict[str, Any]], epochs: int) -> str:
    reference = found[REFERENCE]
    rows = []
    for strategy, one in found.items():
        if "error" in one:
            rows.append([f"`{strategy}`", one["error"], "", "", ""])
            continue
        points = 100 * (one["accuracy"] - reference["accuracy"])
        rows.append(
            [f"`{strategy}`", f"{100 * one['accuracy']:.2f} %", f"**{points:+.2f}**",
             f"{one['loss']:.3f}", f"{one['sent'] / reference['sent']:.3f}"]
        )  # fmt: skip
    about = (
        "## Accuracy at equal samples\n\n"
        f"`recipes/fashion-mnist.yaml`, {epochs} epochs, two ranks, nothing else changed (SGD with "
        "momentum at 0.1, cosine). Points are percent of the 10,000 test images beside `dp2`; the "
        "seed is one; how far another moves an accuracy was not measured. Bytes are "
        "what rank 0 gave to send. `solo` trains each member on half of the samples, without the "
        "tenth that is held out; its figure is the mean of the members. Goal: within 1 point."
    )
    head = ["", "accuracy", "points", "loss", f"bytes ÷ {REFERENCE}"]
    return f"{about}\n\n{table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--only", help="strategies, with commas; all otherwise")
    parser.add_argument("--results", type=Path, help="a JSON file of runs that are done")
    given = parser.parse_args()
    known = (
        json.loads(given.results.read_text()) if given.results and given.results.exists() else {}
    )
    for strategy in given.only.split(",") if given.only else (REFERENCE, *MEMBERS):
        if strategy not in known:
            known[strategy] = run_once(strategy, given.epochs)
        if given.results:
            given.results.write_text(json.dumps(known, indent=2) + "\n")
    if REFERENCE in known:
        print(page(known, given.epochs))


if __name__ == "__main__":
    main()
