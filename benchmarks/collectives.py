"""How fast do the ranks of one host talk: gloo over loopback, and memory that they share?

    python benchmarks/collectives.py [--rounds 5]

All collectives, from 4 KB to 64 MB, on two ranks and on four (where there are fewer cores, ranks
take turns), by three carriers interleaved in one run: gloo, shared memory with the C library, and
shared memory in Python. A size is that of the largest tensor: what an all-gather gives, what a
reduce-scatter takes. One thread a rank. Then a step of DistributedDataParallel by each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator

SIZES = {"4 KB": 1 << 12, "64 KB": 1 << 16, "256 KB": 1 << 18, "1 MB": 1 << 20, "4 MB": 1 << 22,
         "16 MB": 1 << 24, "64 MB": 1 << 26}  # fmt: skip
CARRIERS = ("gloo", "C", "Python")
COLLECTIVES = ("all-reduce", "all-reduce bf16", "reduce-scatter", "all-gather", "broadcast")

RANK = """
import json, sys, time
from unittest import mock
import torch
import torch.distributed as dist
from torch import nn
from shoal.comm import shared_memory
from shoal.comm.shared_memory import native

rank, size, store, rounds = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
sizes = json.loads(sys.argv[5])
torch.set_num_threads(1)
shared_memory.register()
dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
groups = {"gloo": dist.group.WORLD}
for core in ("C", "Python"):
    with mock.patch.object(native, "available", return_value=core == "C"):
        groups[core] = dist.new_group(backend=shared_memory.BACKEND)
scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

def call_of(name, count):
    whole = torch.ones(count // 4)
    part = torch.ones(count // 4 // size)
    narrow = torch.ones(count // 2, dtype=torch.bfloat16)
    return {
        "all-reduce": lambda group: dist.all_reduce(whole, dist.ReduceOp.SUM, group=group),
        "all-reduce bf16": lambda group: dist.all_reduce(narrow, group=group),
        "reduce-scatter": lambda group: scatter(part, whole, group=group),
        "all-gather": lambda group: gather(whole, part, group=group),
        "broadcast": lambda group: dist.broadcast(whole, 0, group=group),
        "barrier": lambda group: dist.barrier(group=group),
        "copy": lambda group: (copied.copy_(original), dist.barrier(group=groups["C"])),
    }[name]

copied, original = torch.ones(1 << 24), torch.ones(1 << 24)

def timed(call, group, times):
    call(group)
    dist.barrier(group=groups["C"])
    began = time.perf_counter()
    for _ in range(times):
        call(group)
    return (time.perf_counter() - began) / times

def step_of(group):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
                        nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    model = nn.parallel.DistributedDataParallel(net, process_group=group, bucket_cap_mb=1)
    inputs = torch.randn(32, 256)
    def step(_group):
        model(inputs).square().mean().backward()
    return step

def tell(**line):
    if rank == 0:
        print(json.dumps(line), flush=True)

for name in json.loads(sys.argv[6]):
    for label, count in (sizes.items() if name not in ("barrier", "copy") else [("-", 1 << 26)]):
        call = call_of(name, count)
        times = max(1, min(20, (8 << 20) // count)) if name != "barrier" else 50
        for _ in range(rounds):
            taken = {carrier: timed(call, group, times) for carrier, group in groups.items()}
            tell(name=name, size=label, **taken)
steps = {carrier: step_of(group) for carrier, group in groups.items()}
for _ in range(rounds):
    tell(name="DDP step", size="-",
         **{carrier: timed(step, None, 10) for carrier, step in steps.items()})
dist.destroy_process_group()
"""

Line = dict[str, float | str]


def run(ranks: int, rounds: int) -> Iterator[Line]:
    """What rank 0 measured: seconds by carrier, a line a round."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    names = json.dumps(["barrier", *COLLECTIVES, "copy"])
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(rank), str(ranks), f"{folder}/store", str(rounds),
                 json.dumps(SIZES), names],
                stdout=subprocess.PIPE, text=True, env=environment,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in started]
    for line in outputs[0].splitlines():
        yield json.loads(line)


def _row(name: str, size: str, lines: list[Line]) -> str:
    medians = [statistics.median(float(line[carrier]) for line in lines) for carrier in CARRIERS]
    cells = [name, size, *(f"{1000 * median:.3f}" for median in medians)]
    for carrier in CARRIERS[1:]:
        ratios = [float(line["gloo"]) / float(line[carrier]) for line in lines]
        cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")
    return f"| {' | '.join(cells)} |"


def _table(ranks: int, rounds: int) -> list[str]:
    found: dict[tuple[str, str], list[Line]] = {}
    for line in run(ranks, rounds):
        found.setdefault((str(line["name"]), str(line["size"])), []).append(line)
    copies = found.pop(("copy", "-"))
    copy_s = statistics.median(float(line["C"]) for line in copies)
    whole = statistics.median(float(line["C"]) for line in found["all-reduce", "64 MB"])
    return [
        f"### {ranks} ranks",
        "",
        "| | size | gloo, ms | shared, C | shared, Python | gloo ÷ C | gloo ÷ Python |",
        "|---|---|---|---|---|---|---|",
        *(_row(name, size, lines) for (name, size), lines in found.items()),
        "",
        f"All ranks copying 64 MB each at once take {1000 * copy_s:.1f} ms "
        f"({2 * ranks * (1 << 26) / copy_s / 1e9:.0f} GB/s read and written together): an "
        f"all-reduce of 64 MB, which has to read and write each tensor once, takes "
        f"{whole / copy_s:.1f} times as long.",
        "",
    ]


def measure(rounds: int) -> str:
    """The section of the results page."""
    lines = [
        "## Collectives on one host",
        "",
        "Milliseconds a call on rank 0, median of the rounds; ratios are those of each round, "
        "median (smallest to largest). float32 unless said otherwise.",
        "",
    ]
    for ranks in (2, 4):
        lines += _table(ranks, rounds)
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    print(measure(parser.parse_args().rounds))
