"""How fast is what one gets by default: `shoal train R` beside what the peers' quick starts give?

Defaults against defaults: what `--strategy auto` picks may compute in other numerics than the
peers' float32, so both final accuracies are stated. Every tool trains the same model from the same
weights on the same data, batch and number of steps, with AdamW; each peer's script is in
`benchmarks/peers` and is as long as its quick start.
"""

import os
import shutil

from sidebyside import (
    RATE,
    Result,
    interleaved,
    means_by_round,
    ratios,
    reason,
    spread,
    table,
    values,
)
from ways import TRYING_STEPS, let_auto_try, peer, peer_versions, shoal, shortened
from workloads import WORKLOADS, Workload

OURS = os.environ.get("BENCH_STRATEGY", "auto")
PEERS = {
    "plain": "plain PyTorch, one process",
    "ddp": "DDP under torchrun, 2 ranks",
    "accelerated": "Accelerate, 2 ranks",
    "fabric": "Fabric, 2 ranks",
    "zero1": "DeepSpeed ZeRO-1, 2 ranks",
    "ray_train": "Ray Train, 2 workers",
}
TUNED = "tuned_ddp"
TUNED_SAYS = "DDP tuned by hand: bf16, channels_last, fused AdamW"
COMPILED_STEPS = 300


def measure(rounds: int, share: float = 1.0) -> str:
    """The section of the results page; ``share`` of the workloads' steps, for a quick look."""
    # Extensions that a peer builds on first use are built now, not in a measured run.
    peer(shortened(WORKLOADS["small-resnet"], 0.05), "zero1")()
    for one in WORKLOADS.values():
        let_auto_try(one, OURS)
    results = {one.name: _side_by_side(shortened(one, share), rounds) for one in WORKLOADS.values()}
    parts = [
        "## 2. Defaults against defaults",
        f"Shoal with `--strategy {OURS}` as it comes; peers as their quick starts have them, in "
        f"float32 ({peer_versions()}). {rounds} rounds; the ratio is shoal ÷ the peer, each "
        "round's. Rates are of the steps after the warm-up. What `auto` tries before a run of "
        f"{TRYING_STEPS} steps or more, it remembers: it has done so in one run beforehand. Batch "
        "norm takes its statistics over a half of the batch, as the peers' two ranks do (one "
        "process: over the batch). The runs are short: accuracies show that all learn alike, not "
        "how well the models can do.",
    ]
    parts += [_section(shortened(WORKLOADS[name], share), found) for name, found in results.items()]
    small = shortened(WORKLOADS["small-resnet"], share)
    parts += [_means(results), _compiled(small, _picked(results[small.name]["shoal"]))]
    return "\n\n".join(parts)


def _side_by_side(workload: Workload, rounds: int) -> dict[str, list[Result]]:
    ways = {"shoal": shoal(workload, OURS)}
    ways |= {name: peer(workload, name) for name in (*PEERS, TUNED)}
    return interleaved(ways, rounds)


def _section(workload: Workload, found: dict[str, list[Result]]) -> str:
    ours = found["shoal"]
    says = {"shoal": f"shoal, {OURS}: `{_picked(ours)}`", **PEERS, TUNED: TUNED_SAYS}
    rows = [
        [
            says[name],
            spread(values(results, RATE), 1),
            "" if name == "shoal" else reason(results) or f"**{spread(ratios(ours, results))}**",
            spread(values(results, "accuracy"), 3),
            spread(values(results, "seconds_to_first_step"), 1),
        ]
        for name, results in found.items()
    ]
    head = ["", "samples/s", "shoal ÷ this", "final accuracy", "s to first step"]
    why = reason(ours)
    title = (
        f"**{workload.name}**, batch {workload.batch}, {workload.steps} steps "
        f"({workload.warmup} of them warm-up)"
    )
    return "\n\n".join([title + (f"; shoal did not run: {why}" if why else ""), table(head, rows)])


def _picked(ours: list[Result]) -> str:
    """What the strategy was resolved to."""
    return next((one["strategy"] for one in ours if isinstance(one, dict)), OURS)


def _means(results: dict[str, dict[str, list[Result]]]) -> str:
    """Geometric means over the workloads, of each peer and of all peers together."""
    every: list[list[float]] = []
    rows = []
    for name, says in PEERS.items():
        columns = [ratios(found["shoal"], found[name]) for found in results.values()]
        every += columns
        rows.append([says, spread(means_by_round(columns))])
    rows.append(["**all peers**", f"**{spread(means_by_round(every))}**"])
    tuned = [ratios(found["shoal"], found[TUNED]) for found in results.values()]
    rows.append([f"({TUNED_SAYS}; not in the mean)", spread(means_by_round(tuned))])
    head = ["geometric mean over the workloads", "shoal ÷ this"]
    return "Goal: 2.0 over all peers, at least 1.8.\n\n" + table(head, rows)


def _compiled(workload: Workload, picked: str) -> str:
    """`+compile` on a longer run, and after how many steps it has paid for itself."""
    if shutil.which("g++") is None:
        return "`+compile`: not measured, there is no g++ to compile with."
    steps = round(COMPILED_STEPS * workload.steps / WORKLOADS[workload.name].steps)
    compiled = "`+compile`"
    ways = {
        compiled: shoal(workload, f"{picked}+compile", f"steps={steps}"),
        f"shoal, {OURS}": shoal(workload, OURS),
        **{says: peer(workload, name) for name, says in PEERS.items() if name in ("plain", "ddp")},
    }
    # One round: the compiled run takes as long as several of the others together.
    found = interleaved(ways, 1)
    rows = [
        [
            name,
            reason(results) or spread(values(results, RATE), 1),
            "" if name == compiled else spread(ratios(found[compiled], results)),
            spread(values(results, "seconds_to_first_step"), 1),
            "" if name == compiled else _paid_after(found[compiled], results, workload.batch),
        ]
        for name, results in found.items()
    ]
    head = ["", "samples/s", "`+compile` ÷ this", "s to first step", "faster in all after steps"]
    text = f"**{workload.name}** compiled, {steps} steps (the others {workload.steps}), 1 round."
    return f"{text} Goal: 2.5 times the peers.\n\n{table(head, rows)}"


def _paid_after(compiled: list[Result], other: list[Result], batch: int) -> str:
    """Steps until the seconds that compiling took before the first step are made up for."""
    mine, theirs = compiled[0], other[0]
    if isinstance(mine, str) or isinstance(theirs, str):
        return ""
    gained = batch / theirs[RATE] - batch / mine[RATE]
    lost = mine["seconds_to_first_step"] - theirs["seconds_to_first_step"]
    return f"{max(0.0, lost / gained):,.0f}" if gained > 0 else "never"
