"""What importing and running Shoal does to a process: no torch where none is needed, no patches."""

import subprocess
import sys

import pytest

LIGHT = {
    "help": "import sys; sys.argv = ['shoal', '--help']; from shoal.cli import main; run(main)",
    "train --help": "sys.argv = ['shoal', 'train', '-h']; from shoal.cli import main; run(main)",
    "values": "import shoal; shoal.Recipe, shoal.Strategy.parse('dp2'), shoal.Cluster.local()",
    "supervisor": "import shoal.train, shoal.cli.train, shoal.launch, shoal.report",
    "a refused strategy": (
        "import shoal\n"
        "from shoal.job import resolve, check_before_start\n"
        "recipe = shoal.Recipe(name='r', batch_size=2, steps=1, model='mlp', "
        "data={'train': 'digits:train'}, objective='mse', optimizer={'name': 'sgd', 'lr': 1.0})\n"
        "check_before_start(recipe)\n"
        "resolve(recipe, 'dp2', shoal.Cluster.local())"
    ),
}
PRELUDE = """
import contextlib, io, sys
def run(main):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main()
"""
HEAVY = ("torch", "sklearn", "bokeh", "pandas", "scipy", "matplotlib")


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT.keys())
def test_nothing_heavy_is_imported(code):
    ask = f"\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code + ask], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# A run as its supervisor sees it: when ranks start, and what has been imported at the end.
SUPERVISED = """
import sys
from shoal.launch import supervisor
start = supervisor.Ranks._start
there = []
def told(self, number):
    there.append(sorted({"shoal.recipe", "numpy", "torch"} & set(sys.modules)))
    return start(self, number)
supervisor.Ranks._start = told
sys.argv = ["shoal", "train", "r.yaml", "--strategy", "single", "--out", "run"]
from shoal.cli import main
try:
    main()
except SystemExit as left:
    print(left.code, there, sorted({"torch", "sklearn", "scipy"} & set(sys.modules)))
"""
SMALL = """
{name: r, batch_size: 200, steps: 1, model: mlp, data: {train: "digits:train"},
 objective: cross_entropy, optimizer: {name: sgd, lr: 0.1}}
"""


def test_ranks_start_before_anything_heavy_and_the_supervisor_never_imports_torch(tmp_path):
    (tmp_path / "r.yaml").write_text(SMALL)
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISED], cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "0 [[]] []", done.stderr


UNCOMPILED = """
import pathlib, sys, tempfile, threading
import shoal
from shoal.cluster import Cluster
from shoal.launch import Context
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train.rank import Task, train_on_rank

recipe = shoal.Recipe(
    name="r", batch_size=400, steps=2, model={"name": "resnet", "width": 4}, normalize_over=100,
    data={"train": "digits:train"}, objective="cross_entropy",
    optimizer={"name": sys.argv[1], "lr": 0.1},
)
run = Run.create_at(pathlib.Path(tempfile.mkdtemp()) / "run")
run.write_inputs(recipe, Strategy.parse("single"), Cluster.local())
context = Context(0, 1, 0, "file:/nowhere", "g", 1, lambda _: None, threading.Event())
train_on_rank(context, Task(recipe.to_dict(), "single", "cpu", str(run.path), False))
print(sorted({"torch._dynamo", "sympy", "bokeh", "sklearn", "scipy", "rich"} & set(sys.modules)))
"""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_rank_that_compiles_nothing_imports_no_compiler(optimizer):
    done = subprocess.run(
        [sys.executable, "-c", UNCOMPILED, optimizer], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


# Each public attribute of torch's main modules, by identity, before Shoal and after a run.
UNTOUCHED = """
import importlib, pathlib, sys, tempfile, threading
import torch

NAMES = ("torch", "torch.nn", "torch.nn.functional", "torch.nn.Module", "torch.nn.BatchNorm2d",
         "torch.nn.Dropout", "torch.nn.Linear", "torch.Tensor", "torch.optim", "torch.optim.SGD",
         "torch.autograd", "torch.distributed", "torch.utils.checkpoint", "torch.random",
         "torch.nn.parallel", "torch.backends", "torch.nn.init")

def find(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        home, _, attribute = name.rpartition(".")
        return getattr(find(home), attribute)

def snapshot():
    found = {}
    for name in NAMES:
        owner = find(name)
        for attribute in dir(owner):
            value = getattr(owner, attribute, None)
            # Bound methods are made anew each time that they are asked for.
            kind = type(value).__name__
            if isinstance(value, type) or kind == "function":
                found[name, attribute] = value
            elif kind == "builtin_function_or_method" and not hasattr(value.__self__, "mro"):
                found[name, attribute] = value
    return found

# What torch itself replaces when these are first used.
import torch._dynamo
torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1).step()
before = snapshot()
import shoal
from shoal.cluster import Cluster
from shoal.launch import Context
from shoal.run import Run
from shoal.strategy import Strategy
from shoal.train.rank import Task, train_on_rank

recipe = shoal.Recipe(
    name="r", batch_size=400, steps=2, model={"name": "resnet", "width": 4}, normalize_over=100,
    data={"train": "digits:train"}, objective="cross_entropy", optimizer={"name": "sgd", "lr": 0.1},
)
run = Run.create_at(pathlib.Path(tempfile.mkdtemp()) / "run")
run.write_inputs(recipe, Strategy.parse("single"), Cluster.local())
context = Context(0, 1, 0, "file:/nowhere", "g", 1, lambda _: None, threading.Event())
train_on_rank(context, Task(recipe.to_dict(), "single+recompute", "cpu", str(run.path), False))
after = snapshot()
print(sorted(f"{a}.{b}" for (a, b), value in before.items() if after.get((a, b)) != value))
print(len(before))
"""


@pytest.mark.timeout(120)
def test_a_run_replaces_nothing_of_torch():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNTOUCHED],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    replaced, seen = done.stdout.splitlines()
    assert replaced == "[]"
    assert int(seen) > 1000
