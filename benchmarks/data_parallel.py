"""What does Shoal cost beside the loop that one would write by hand? (samples/s, same numerics)

The digits recipe's model and batches, in four ways: a hand-written loop in one process, `single`, a
hand-written loop with DistributedDataParallel on two ranks, `dp2`. The same threads for each pair.
Batch statistics: the hand-written DDP has each rank's own (torch has no SyncBatchNorm on the CPU),
`dp2` those of the whole batch; `dp2` with statistics groups of a rank's size computes what the
hand-written one does.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "digits.yaml"
STEPS = 60
BATCH = 128

BY_HAND = """
import os, sys, time, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from shoal import data, models
from shoal.recipe import Recipe

rank, ranks, steps = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
recipe = Recipe.from_yaml(sys.argv[4])
if ranks > 1:
    where = "file://" + sys.argv[5]
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks)
torch.manual_seed(0)
train, _ = data.resolve(recipe.data)
about = data.describe(train)
feed = data.open_feed(train, batch_size=recipe.batch_size, seed=0, shuffle=True)
examples = [feed.read(step, 0, feed.batch_examples(step)) for step in range(feed.steps_per_epoch)]
inputs = torch.cat([batch.inputs for batch in examples])
targets = torch.cat([batch.targets for batch in examples])
model = models.build(recipe.model, classes=about.num_classes, in_channels=about.in_channels,
                     image_size=about.image_size)
net = DistributedDataParallel(model) if ranks > 1 else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
share = recipe.batch_size // ranks
seen, started = 0, time.perf_counter()
while seen < steps:
    order = torch.randperm(len(inputs))
    for start in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
        rows = order[start + rank * share : start + (rank + 1) * share]
        outputs = net(inputs[rows])
        loss = torch.nn.functional.cross_entropy(outputs, targets[rows], label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += 1
        if seen == steps:
            break
if rank == 0:
    print(steps * recipe.batch_size / (time.perf_counter() - started))
if ranks > 1:
    dist.destroy_process_group()
"""


def by_hand(ranks: int) -> float:
    """Samples per second of the hand-written loop."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", BY_HAND, str(rank), str(ranks), str(STEPS), str(RECIPE),
                 f"{folder}/store"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in started]
    return float(outputs[0])


def shoal(strategy: str, *changes: str) -> float:
    """Samples per second that `shoal train` reports."""
    sets = ["evaluate.every=1000 steps", "checkpoint.every=1000 steps", "data.evaluate=null"]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "shoal", "train", str(RECIPE), "--strategy", strategy,
                   "--out", f"{folder}/run", "--json", "--set", f"steps={STEPS}"]  # fmt: skip
        command += [part for change in (*sets, *changes) for part in ("--set", change)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["samples_per_second"])


def measure(rounds: int) -> str:
    """The section of the results page."""
    ways: dict[str, Callable[[], float]] = {
        "one process, by hand": lambda: by_hand(1),
        "shoal single": lambda: shoal("single"),
        "two ranks, DDP by hand (own statistics)": lambda: by_hand(2),
        "shoal dp2, statistics groups of 64": lambda: shoal("dp2", "normalize_over=64"),
        "shoal dp2, statistics of the whole batch": lambda: shoal("dp2"),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(way())
    beside = dict.fromkeys(list(ways)[:2], "one process, by hand")
    beside |= dict.fromkeys(list(ways)[2:], "two ranks, DDP by hand (own statistics)")
    lines = [
        "## Data parallel beside a hand-written loop",
        "",
        f"digits recipe, batch {BATCH}, {STEPS} steps, float32; the ratio is that of each round.",
        "",
        "| | samples/s (min to max) | ratio | beside |",
        "|---|---|---|---|",
    ]
    for name, values in rates.items():
        ratios = [mine / other for mine, other in zip(values, rates[beside[name]], strict=True)]
        lines.append(
            f"| {name} | {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}) "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {beside[name]} |"
        )
    return "\n".join(lines)
