"""What does starting cost: `shoal --help`, the time to the first step, the memory of the ranks?

The hand-written loops are those of `same_numerics.py`; two ranks of them are started by torchrun
and, with less to import, as two bare processes. Memory is the highest resident size (VmHWM) of each
process below the command.
"""

import statistics
import subprocess
import sys
import time
from functools import partial

import sidebyside
from sidebyside import Result, interleaved, ratios, reason, spread, table, values
from ways import by_hand, shoal, shortened
from workloads import WORKLOADS

HELP_ROUNDS = 21
FIRST = "seconds_to_first_step"
_SHOAL = "import sys; sys.argv[0] = 'shoal'; from shoal.cli import main; main()"
_HELP_MODULES = """
import sys
from shoal.cli import main
try:
    sys.argv = ["shoal", "--help"]
    main()
except SystemExit:
    pass
print("torch" in sys.modules, file=sys.stderr)
"""


def measure(rounds: int, share: float = 1.0) -> str:
    """The section of the results page; ``share`` of the workloads' steps, for a quick look."""
    return "\n\n".join(["## 5. Start-up", _help(), _first_step(rounds, share)])


def _help() -> str:
    bare, ours = [], []
    for _ in range(HELP_ROUNDS):
        bare.append(_seconds("-c", "pass"))
        ours.append(_seconds("-c", _SHOAL, "--help"))
    times = [mine / other for mine, other in zip(ours, bare, strict=True)]
    command = [sys.executable, "-c", _HELP_MODULES]
    done = subprocess.run(command, capture_output=True, text=True, env=sidebyside.environment())
    imported = done.stderr.split()[-1:] != ["False"]
    return (
        f"`shoal --help` takes {1000 * statistics.median(ours):.0f} ms, a bare interpreter "
        f"{1000 * statistics.median(bare):.0f} ms: **{spread(times, 1)}** times as long "
        f"({HELP_ROUNDS} rounds; goal: at most 8). torch is {'' if imported else 'not '}imported."
    )


def _seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        check=True,
        env=sidebyside.environment(),
        cwd=sidebyside.ROOT,
    )
    return time.perf_counter() - started


def _first_step(rounds: int, share: float) -> str:
    work = shortened(WORKLOADS["small-resnet"], share * 0.5)
    hand = partial(by_hand, work, "--no-evaluation", peaks=True)
    over, no_evaluation = f"normalize_over={work.batch // 2}", "data.evaluate=null"
    ways = {
        "one process, by hand": hand(),
        "shoal single": shoal(work, "single", "normalize_over=batch", no_evaluation, peaks=True),
        "two bare processes, by hand": hand(ranks=2),
        "two ranks by torchrun, by hand": hand(ranks=2, torchrun=True),
        "shoal dp2": shoal(work, "dp2", over, no_evaluation, peaks=True),
    }
    found = {name: _with_peaks(results) for name, results in interleaved(ways, rounds).items()}
    beside = {
        "shoal single": ["one process, by hand"],
        "shoal dp2": ["two bare processes, by hand", "two ranks by torchrun, by hand"],
    }
    rows = [
        [
            name,
            reason(results) or spread(values(results, FIRST)),
            spread([one / 2**20 for one in values(results, "rank_peak")], 0),
            spread([one / 2**20 for one in values(results, "all_peaks")], 0),
            *(
                "; ".join(spread(ratios(results, found[other], key)) for other in beside[name])
                if name in beside
                else ""
                for key in (FIRST, "rank_peak")
            ),
        ]
        for name, results in found.items()
    ]
    head = ["", "s to first step", "MiB, largest process", "MiB, all processes",
            "first step ÷ by hand", "largest process ÷ by hand"]  # fmt: skip
    text = (
        f"From the command to the end of the first step ({work.name}, {work.steps} steps), "
        f"{rounds} rounds. Goal: within 10 % of the hand-written loop's. `dp2` is beside two bare "
        "processes; beside torchrun."
    )
    return f"{text}\n\n{table(head, rows)}"


def _with_peaks(results: list[Result]) -> list[Result]:
    return [
        {**one, "rank_peak": max(one["peaks"]), "all_peaks": sum(one["peaks"])}
        if isinstance(one, dict)
        else one
        for one in results
    ]
