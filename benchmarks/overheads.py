"""What do evaluation, checkpoints and the log cost of a run's wall time, at the recipes' defaults?

    evaluation    the run's own clock
    checkpoints   what training waits for them (the run's own clock), and how much slower its steps
                  are than in a run beside it that saves only at its end; the thread's seconds in
                  which training went on are the most that it can have been slowed by
    the log       time within the calls that log and show, in a run of one rank in one process, and
                  the processor time of the supervisor between the first step and the last

digits runs as it is. fashion-mnist is cut short, with every evaluation and every checkpoint counted
by what it costs and how often it comes in the whole run.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.job import workload_of
from shoal.recipe import Recipe

RECIPES = Path(__file__).parent.parent / "recipes"
SELDOM = "1000000 steps"

# The command, with the supervisor's processor time while the ranks train.
SUPERVISED = """
import json, sys, time
from shoal import Recipe, report, train
marks = []
original = report.live.PlainView.show
def show(view, message):
    if message.get("kind") in ("start", "step", "evaluation", "checkpoint"):
        original(view, message)
        marks.append((time.perf_counter(), time.process_time()))
    else:
        original(view, message)
report.live.PlainView.show = show
recipe = Recipe.from_yaml(sys.argv[1]).with_changes(*sys.argv[3:])
summary = train(recipe, out=sys.argv[2]).summary
(wall, used), (wall_end, used_end) = marks[0], marks[-1]
print(json.dumps({**summary, "supervisor": (used_end - used) / (wall_end - wall)}))
"""

# One rank in this process: the time within what logs and shows.
LOGGED = """
import json, sys, time
from shoal.cluster import Cluster
from shoal.launch import Context
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train.loop import Loop
from shoal.train.rank import Task, train_on_rank
from pathlib import Path
import threading
spent, calls = 0.0, 0
original = Loop._note
def note(loop, *arguments):
    global spent, calls
    began = time.perf_counter()
    original(loop, *arguments)
    spent, calls = spent + time.perf_counter() - began, calls + 1
Loop._note = note
recipe = Recipe.from_yaml(sys.argv[1]).with_changes(*sys.argv[3:])
run = Run.create_at(Path(sys.argv[2]))
run.write_inputs(recipe, Strategy.parse("single"), Cluster.local())
pipe = open("/dev/null", "w")
send = lambda message: pipe.write(json.dumps(message) + "\\n") and pipe.flush()
context = Context(0, 1, 0, "file:/nowhere", "bench", 1, send, threading.Event())
train_on_rank(context, Task(recipe.to_dict(), "single", "cpu", str(run.path), False))
print(json.dumps({"seconds": spent / calls}))
"""


@dataclass(frozen=True)
class Case:
    """A recipe; `steps` where it is cut short, with so many checkpoints on the way."""

    name: str
    steps: int | None = None
    checkpoints: int = 0

    @property
    def path(self) -> Path:
        return RECIPES / f"{self.name}.yaml"

    def changes(self, *, saves: bool) -> list[str]:
        """What a run with checkpoints, or one that saves only at its end, changes."""
        seldom = [f"evaluate.every={SELDOM}", f"checkpoint.every={SELDOM}"]
        if self.steps is None:
            return [] if saves else seldom
        cut = [f"steps={self.steps}", *seldom]
        if saves:
            cut[-1] = f"checkpoint.every={self.steps // self.checkpoints} steps"
        return cut


@dataclass(frozen=True)
class Defaults:
    """A whole run at the recipe's defaults: its steps, and how often it evaluates and saves."""

    steps: int
    evaluations: int
    checkpoints: int

    @classmethod
    def of(cls, path: Path) -> "Defaults":
        recipe = Recipe.from_yaml(path)
        work = workload_of(recipe)
        per_epoch, total = work.feed.steps_per_epoch, work.total_steps
        evaluated, saved = (
            {*range(every, total + 1, every), total}
            for every in (
                recipe.evaluate.every.steps(per_epoch) or total,
                recipe.checkpoint.every.steps(per_epoch) or total,
            )
        )
        # The best so far is saved too: at worst each evaluation is.
        return cls(total, len(evaluated), len(saved | evaluated))


def _child(code: str, case: Case, changes: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", code, str(case.path), f"{folder}/run", *changes]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
    value: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return value


def _round(case: Case, defaults: Defaults, number: int = 0) -> dict[str, float]:
    """One pair of runs, one beside the other, in shares of the whole run's time; steps in ms."""
    runs = {}
    for saves in (number % 2 == 0, number % 2 == 1):  # who is first changes: machines warm up
        runs[saves] = _child(SUPERVISED, case, case.changes(saves=saves))
    saving, bare = runs[True], runs[False]
    logged = _child(LOGGED, case, case.changes(saves=False))["seconds"]
    timings, steps = saving["timings"], saving["steps"]
    evaluations = defaults.evaluations if case.steps is None else 1
    checkpoints = defaults.checkpoints if case.steps is None else case.checkpoints
    evaluation = timings["evaluation"] / evaluations * defaults.evaluations
    per_run = defaults.checkpoints / checkpoints
    waited, hidden = timings["checkpoint"] * per_run, timings["checkpoint_hidden"] * per_run
    slower = (timings["step"] - bare["timings"]["step"]) * per_run
    step = bare["timings"]["step"] / steps
    total = step * defaults.steps + evaluation + waited
    return {
        "step, ms": 1000 * step,
        "evaluation": evaluation / total,
        "checkpoints: waited for": waited / total,
        "checkpoints: steps slower": slower / total,
        "checkpoints: thread's seconds beside training": hidden / total,
        "log: within the rank": logged / step,
        "log: supervisor's processor time": saving["supervisor"],
    }


def measure(rounds: int) -> str:
    """The section of the results page."""
    lines = [
        "## What evaluation, checkpoints and the log cost",
        "",
        "Shares of a run's wall time at the recipes' defaults, `--strategy auto`; medians over "
        f"{rounds} interleaved rounds (min to max). `Steps slower` is the difference of two runs, "
        "and as uncertain as its spread says; the line below it is the most that it can be.",
        "",
    ]
    for case in (Case("digits"), Case("fashion-mnist", steps=120, checkpoints=3)):
        defaults = Defaults.of(case.path)
        found = [_round(case, defaults, number) for number in range(rounds)]
        cut = f", measured on {case.steps} of them" if case.steps else ""
        lines += [
            f"{case.name}: {defaults.steps} steps{cut}, {defaults.evaluations} evaluations, "
            f"at most {defaults.checkpoints} checkpoints.",
            "",
            "| | share of the run |",
            "|---|---|",
        ]
        lines += [_row(name, [each[name] for each in found]) for name in found[0]]
        lines.append("")
    return "\n".join(lines)


def _row(name: str, values: list[float]) -> str:
    shown = (statistics.median(values), min(values), max(values))
    if name.endswith("ms"):
        median, least, most = (f"{value:.1f}" for value in shown)
    else:
        median, least, most = (f"{value:.2%}" for value in shown)
    return f"| {name} | {median} ({least} to {most}) |"


if __name__ == "__main__":
    print(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
