"""How much of what this machine can compute does training use, and where does a step's time go?

    share = model FLOPs of a sample × samples/s ÷ the bf16 matrix rate

FLOPs are three times those that torch's counter finds in a forward pass (convolutions, matrix
products; backward is two products for each), as is usual: its count of a backward pass takes
grouped convolutions for whole ones, 64 times too much for 64 groups. The matrix rate is measured in
the same run with as many processes and threads as the run has: bf16 products of several shapes, the
best.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import sidebyside
from sidebyside import RATE, Result, cores, interleaved, spread, table, values
from ways import let_auto_try, shoal, shortened
from workloads import WORKLOADS, Workload

OURS = os.environ.get("BENCH_STRATEGY", "auto")
SHAPES = ((2048, 1024, 1024), (1024, 1024, 1024), (4096, 1024, 1024), (2048, 2048, 2048))
SHAPE_S = 0.4
PARTS = {
    "input": "step.input",
    "forward": "step.forward",
    "backward": "step.backward",
    "exposed communication": "step.communication_exposed",
    "optimizer": "step.optimizer",
    "rest": "step.rest",
}
HIDDEN = "step.communication_hidden"  # runs while backward does: no part of the sum

_RATE = """
import json, sys, time, torch
shapes, seconds, at, dtype = json.loads(sys.argv[1]), *map(float, sys.argv[2:4]), sys.argv[4]
torch.set_num_threads(int(sys.argv[5]))
rates = []
for number, (m, k, n) in enumerate(shapes):
    a = torch.randn(m, k).to(getattr(torch, dtype))
    b = torch.randn(k, n).to(getattr(torch, dtype))
    a @ b
    begin = at + number * 2 * seconds
    time.sleep(max(0.0, begin - time.time()))
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        a @ b
        count += 1
    rates.append(count * 2 * m * k * n / (time.perf_counter() - started))
print(json.dumps(rates))
"""


def matrix_rate(processes: int, threads: int, dtype: str = "bfloat16") -> float:
    """FLOP/s of matrix products, of so many processes at once; that of the best shape."""
    at = time.time() + 5.0  # by then all have imported torch, and multiply at the same moments
    command = [sys.executable, "-c", _RATE, json.dumps(SHAPES), str(SHAPE_S), repr(at), dtype,
               str(threads)]  # fmt: skip
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=sidebyside.environment(threads)
        )
        for _ in range(processes)
    ]
    rates = [json.loads(one.communicate()[0]) for one in started]
    return max(sum(shape) for shape in zip(*rates, strict=True))


def flops_of_a_sample(name: str) -> float:
    """Of one forward and backward pass."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    import loaded

    samples = 4
    model = loaded.build_model(name)
    if name == "transformer":
        inputs = torch.randint(2, loaded.VOCABULARY, (samples, loaded.LENGTH))
    else:
        side = 32 if name == "small-resnet" else 56
        inputs = torch.randn(samples, 1, side, side)
    # The fused attention of the CPU is not in the counter's table; its parts are.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs)
    return 3 * counter.get_total_flops() / samples


def measure(rounds: int, share: float = 1.0) -> str:
    """The section of the results page; ``share`` of the workloads' steps, for a quick look."""
    peaks: dict[tuple[int, str], float] = {}
    used, split = [], []
    for workload in (shortened(one, share) for one in WORKLOADS.values()):
        let_auto_try(workload, OURS)
        results = interleaved({workload.name: shoal(workload, OURS)}, rounds)[workload.name]
        ran = [one for one in results if isinstance(one, dict)]
        if not ran:
            used.append([workload.name, str(results[0]), "", "", "", ""])
            continue
        ranks = ran[0]["world_size"]
        if (ranks, "bfloat16") not in peaks:
            for dtype in ("bfloat16", "float32"):
                peaks[ranks, dtype] = matrix_rate(ranks, max(1, cores() // ranks), dtype)
        used.append(_used(workload, results, peaks[ranks, "bfloat16"], ran[0]["strategy"]))
        split.append(_split(workload, ran))
    says = ", ".join(
        f"{ranks} process(es) of {max(1, cores() // ranks)} thread(s), {dtype}: {rate / 1e9:.0f}"
        for (ranks, dtype), rate in peaks.items()
    )
    head = ["workload", "strategy", "samples/s", "GFLOP a sample", "GFLOP/s", "÷ bf16 matrix rate"]
    parts = [
        "## 3. Against the machine",
        f"Matrix products here, GFLOP/s: {says}. Goal: 60 % on the transformer. {rounds} rounds.",
        table(head, used),
        "Milliseconds of a step (share of the step), median of the rounds, whole run. Hidden "
        "communication runs while backward does and is no part of the sum; – is not in the run's "
        "document.",
        table(["workload", "step", *PARTS, "hidden communication"], split),
    ]
    return "\n\n".join(parts)


def _used(workload: Workload, results: list[Result], peak: float, strategy: str) -> list[str]:
    flops, rates = flops_of_a_sample(workload.name), values(results, RATE)
    done = flops * statistics.median(rates)
    shares = [100 * flops * rate / peak for rate in rates]
    return [
        workload.name,
        f"`{strategy}`",
        spread(rates, 1),
        f"{flops / 1e9:.2f}",
        f"{done / 1e9:.0f}",
        f"**{spread(shares, 0)} %**",
    ]


def _split(workload: Workload, ran: list[dict]) -> list[str]:
    step = statistics.median(one["timings"]["step"] / one["steps"] for one in ran)
    cells = [workload.name, f"{1000 * step:.0f}"]
    for key in (*PARTS.values(), HIDDEN):
        seconds = [one["timings"][key] / one["steps"] for one in ran if key in one["timings"]]
        middle = statistics.median(seconds) if seconds else None
        cells.append(
            "–" if middle is None else f"{1000 * middle:.1f} ({100 * middle / step:.0f} %)"
        )
    return cells
