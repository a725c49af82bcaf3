"""Local SGD and DiLoCo by Shoal, by torchft and by hivemind: one job, two hosts.

    python benchmarks/local_peers.py [--rounds 1] [--rate 100mbit] [--only NAME,…]

ResNet-18 of 11.2 million parameters, the same start, batches, rates and steps (`local_start.py`), a
rank of one thread on each of two network namespaces, so that the bytes between them can be
counted. Samples a second after the first round, meetings included; loss on held-out data at the
end, after a meeting.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sidebyside
import workloads
from local_start import BATCH, LR, MOMENTUM
from namespaces import Ended, Host, missing, run_ranks, two_hosts
from sidebyside import RATE, ROOT, interleaved, ratios, reason, spread, table, values
from workloads import HERE

STEPS, EVERY = 64, 16
PYTHON = Path(os.environ.get("BENCH_LOCAL_PYTHON", HERE / ".venv-local/bin/python"))
PLAIN, OUTER = "1 0", "0.7 0.9"
RECIPE = f"""
name: local-peers
batch_size: {BATCH}
steps: {STEPS}
precision: float32
model: {{name: "local_start:build"}}
data: {{train: benchmarks/.data/small-resnet.npz, evaluate: auto}}
objective: cross_entropy
optimizer: {{name: sgd, lr: {LR}, momentum: {MOMENTUM}}}
schedule: constant
evaluate: {{every: 1000000 steps, metrics: [accuracy]}}
checkpoint: {{every: 1000000 steps, keep: 1}}
"""
TITLE = "## Local SGD and DiLoCo beside torchft and hivemind"


def ways(rate: str | None) -> dict[str, Any]:
    """By what is printed in the table; the first of each group is Shoal's."""
    return {
        f"Shoal `dp2/local:{EVERY}`": lambda: shoal(f"dp2/local:{EVERY}", rate),
        "torchft `LocalSGD`": lambda: peer("torchft", rate, f"local {PLAIN}"),
        "hivemind `Optimizer`, local updates": lambda: peer("hivemind", rate, ""),
        f"Shoal `dp2/diloco:{EVERY}`": lambda: shoal(f"dp2/diloco:{EVERY}", rate),
        "torchft `DiLoCo`": lambda: peer("torchft", rate, f"diloco {OUTER}"),
        "torchft `DiLoCo`, buckets": lambda: peer("torchft", rate, f"diloco-buckets {OUTER}"),
    }


def measure(rounds: int) -> str:
    """The section of the results page."""
    why = missing()
    if why is not None:
        return f"{TITLE}\n\nSkipped: {why}."
    workloads.prepare()
    return "\n\n".join([about(rounds), *(compared(rounds, rate) for rate in (None, "100mbit"))])


def about(rounds: int) -> str:
    return (
        f"{TITLE}\n\n"
        f"ResNet-18 of 11.2 million parameters on Fashion-MNIST at 8×8, batches of {BATCH}, SGD "
        f"{LR} with momentum {MOMENTUM}, {STEPS} steps, meetings every {EVERY}: the same start, "
        "batches and rates for all. A rank of one thread on each of two network namespaces, "
        f"{rounds} round(s), interleaved. Samples/s after the first {EVERY} steps, meetings "
        "included; bytes that left the first host, start-up included; loss on held-out data."
    )


def compared(rounds: int, rate: str | None, only: Sequence[str] = ()) -> str:
    """The table at one rate of the link."""
    chosen = {
        name: way
        for name, way in ways(rate).items()
        if not only or any(part in name for part in only)
    }
    results = interleaved(chosen, rounds)
    rows, base = [], None
    for name, found in results.items():
        base = found if base is None or name.startswith("Shoal") else base
        why = reason(found)
        if why is not None:
            rows.append([name, why, "", "", "", ""])
            continue
        sent = spread([value / 1e6 for value in values(found, "sent")], 1)
        rows.append([name, spread(values(found, RATE), 1),
                     f"**{spread(ratios(base, found))}**", sent,
                     spread(values(found, "loss"), 3),
                     spread(values(found, "meetings"), 0)])  # fmt: skip
    head = ["", "samples/s", "Shoal ÷ it", "MB sent", "loss", "meetings"]
    link = "as fast as memory" if rate is None else f"of {rate}"
    return f"A link {link}:\n\n{table(head, rows)}"


def shoal(strategy: str, rate: str | None) -> sidebyside.Result:
    """`shoal train` on both hosts."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, two_hosts(rate) as hosts:
        recipe = Path(folder) / "local-peers.yaml"
        recipe.write_text(RECIPE, encoding="utf-8")
        command = [sys.executable, "-m", "shoal", "train", str(recipe), "--json", "--comm", "gloo"]
        command += ["--strategy", strategy, "--out", f"{folder}/run"]
        ended = run_ranks(hosts, command, _environment(), cwd=ROOT)
        found = _document(ended)
        if isinstance(found, str):
            return found
        log = Path(folder, "run/metrics.jsonl").read_text(encoding="utf-8")
        sent = hosts[0].sent()
    lines = [json.loads(line) for line in log.splitlines()]
    steps = [line for line in lines if "evaluation" not in line and line["step"] >= EVERY]
    seconds = steps[-1]["seconds"] - steps[0]["seconds"]
    measured = (steps[-1]["samples"] - steps[0]["samples"]) / seconds
    loss = found["metrics"]["loss"]
    return {RATE: measured, "loss": loss, "sent": sent, "meetings": STEPS // EVERY}


def peer(name: str, rate: str | None, kind: str) -> sidebyside.Result:
    """A peer's script on both hosts."""
    if not PYTHON.exists():
        return "the peers' environment is not there: `make bench` makes it"
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, two_hosts(rate) as hosts:
        script = HERE / "peers" / f"{name}_local.py"
        options = ["--steps", str(STEPS), "--every", str(EVERY), "--folder", folder]
        ended = run_ranks(
            hosts,
            [str(PYTHON), str(script), *options],
            _environment() | {"BENCH_KIND": kind},
            each=_own,
            timeout_s=200.0,
        )
        sent = hosts[0].sent()
        found = _document(ended)
    return found if isinstance(found, str) else {**found, "sent": sent}


def _own(host: Host) -> dict[str, str]:
    """What a peer does not find out by itself."""
    return {"BENCH_ADDRESS": host.address, "GLOO_SOCKET_IFNAME": host.interface}


def _environment() -> dict[str, str]:
    ours = sidebyside.environment(1)
    del ours["GLOO_SOCKET_IFNAME"]  # it is lo's: Shoal finds the way to the other host
    path = f"{HERE}{os.pathsep}{ours['PYTHONPATH']}"
    return ours | {"PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "ERROR"}


def _document(ended: Sequence[Ended]) -> sidebyside.Result:
    first = ended[0]
    status = max(abs(one.status) for one in ended) if first.status == 0 else first.status
    return sidebyside.Ended(first.output, first.errors, status, ()).document()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rate", help="of the link, as tc reads it; as fast as memory otherwise")
    parser.add_argument("--only", default="", help="parts of names, with commas")
    given = parser.parse_args()
    why = missing()
    if why is not None:
        raise SystemExit(f"skipped: {why}")
    workloads.prepare()
    print(compared(given.rounds, given.rate, [one for one in given.only.split(",") if one]))


if __name__ == "__main__":
    main()
