"""Is Shoal as fast as the loop that one would write by hand, with the same numerics?

By hand (`by_hand.py`): data in memory, fused AdamW, gradients set to None; on two ranks DDP with
its buckets as gradients, one thread a rank. `single` normalises over the batch, `dp2` over groups
of a rank's share, which is what the hand-written loops compute. Each in float32, and in bf16
autocast with channels_last.
"""

from functools import partial

from sidebyside import RATE, interleaved, ratios, reason, spread, table, values
from ways import by_hand, shoal, shortened
from workloads import WORKLOADS, Workload

PRECISIONS = {"float32": ("", ()), "bf16, channels_last": ("+bf16+channels_last", ("--bf16",))}


def measure(rounds: int, share: float = 1.0) -> str:
    """The section of the results page; ``share`` of the workloads' steps, for a quick look."""
    rows = [row for one in WORKLOADS.values() for row in _rows(shortened(one, share), rounds)]
    goals = f"Goal: 1.05, at least 1.00 within noise. {rounds} rounds; the ratio is each round's."
    head = ["workload", "", "by hand, samples/s", "shoal, samples/s", "shoal ÷ by hand"]
    about = [
        f"{one.name}: batch {one.batch}, {one.steps - one.warmup} steps after {one.warmup}"
        for one in (shortened(one, share) for one in WORKLOADS.values())
    ]
    return "\n\n".join(["## 1. Same numerics", f"{'; '.join(about)}. {goals}", table(head, rows)])


def _rows(workload: Workload, rounds: int) -> list[list[str]]:
    ways = {}
    for name, (suffix, options) in PRECISIONS.items():
        for strategy, ranks in (("single", 1), ("dp2", 2)):
            over = "batch" if ranks == 1 else workload.batch // ranks
            make = partial(shoal, workload, strategy + suffix)
            ways[f"{strategy}, {name}: by hand"] = by_hand(
                workload, "--no-evaluation", *options, ranks=ranks
            )
            ways[f"{strategy}, {name}: shoal"] = make(
                f"normalize_over={over}", "data.evaluate=null"
            )
    results = interleaved(ways, rounds)
    rows = []
    for name in [name.removesuffix(": shoal") for name in ways if name.endswith(": shoal")]:
        hand, ours = results[f"{name}: by hand"], results[f"{name}: shoal"]
        ratio = reason(hand) or reason(ours) or f"**{spread(ratios(ours, hand))}**"
        rates = [spread(values(results_, RATE), 1) for results_ in (hand, ours)]
        rows.append([workload.name, name, *rates, ratio])
    return rows
