"""What the ranks do where `auto` lets them try other numerics."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.cluster import computes_in_bf16
from shoal.errors import UserCodeError
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.train.entry import try_on_rank


def task(**changes: Any) -> dict[str, Any]:
    recipe = {
        "name": "small",
        "batch_size": 32,
        "steps": 75,
        "model": {"name": "resnet", "depth": 18, "width": 4, "stem": "small"},
        "data": {"train": "digits:train"},
        "objective": "cross_entropy",
        "optimizer": {"name": "sgd", "lr": 0.01},
    }
    return {"recipe": recipe | changes, "strategy": "dp2", "device": "cpu"}


def try_all_steps(context: Any, of: dict[str, Any]) -> Any:
    """None is given up as slow, which one may be on a machine that is busy just then."""
    from shoal.train import trial

    usual, trial.GIVEN_UP = trial.GIVEN_UP, float("inf")
    try:
        return try_on_rank(context, of)
    finally:
        trial.GIVEN_UP = usual


def test_each_candidate_trains_from_the_same_weights_on_the_same_batches(pool: Any) -> None:
    outcomes = pool.call(try_all_steps, task(), ranks=2)
    assert outcomes[0] == outcomes[1]
    plain, both, layout = outcomes[0]["tried"]
    assert [each["strategy"] for each in outcomes[0]["tried"]] == [
        "dp2",
        "dp2+bf16+channels_last",
        "dp2+channels_last",
    ]
    assert all(each["failed"] is None and each["step_s"] > 0 for each in (plain, both, layout))
    assert len(plain["losses"]) == 5
    # The memory format changes rounding alone, bf16 more than that.
    assert layout["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert both["losses"] != plain["losses"]
    assert both["losses"][0] == pytest.approx(plain["losses"][0], rel=0.05)


def test_short_runs_try_nothing(pool: Any) -> None:
    (outcome, _) = pool.call(try_on_rank, task(steps=74), ranks=2)
    assert outcome["tried"] == []
    assert "74 steps are too few" in outcome["reason"]


def test_numerics_that_fail_do_not_fail_the_run(pool: Any, tmp_path: Any) -> None:
    (tmp_path / "exact.py").write_text(
        "from torch import nn\n"
        "import torch\n"
        "class Exact(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        out = self.fc(x.flatten(1))\n"
        "        assert_float32(out)\n"
        "        return out\n"
        "def assert_float32(x):\n"
        "    if x.dtype != torch.float32:\n"
        "        raise RuntimeError('float32 only')\n"
    )
    (outcome, _) = pool.call(_try_with_path, str(tmp_path), task(model="exact:Exact"), ranks=2)
    plain, both, layout = outcome["tried"]
    assert plain["failed"] is None
    assert "float32 only" in both["failed"]
    assert layout["failed"] is None


def test_one_rank_that_is_asked_to_stop_stops_all(pool: Any) -> None:
    """A signal reaches ranks one after the other: they agree on it before one leaves."""
    outcomes = pool.call(_try_when_rank_1_was_asked_to_stop, task(), ranks=2)
    assert [outcome["tried"] for outcome in outcomes] == [[], []]


def _try_when_rank_1_was_asked_to_stop(context: Any, given: dict[str, Any]) -> Any:
    if context.rank == 1:
        context.stop_requested.set()
    return try_on_rank(context, given)


def test_an_error_in_plain_numerics_is_the_runs_own(pool: Any, tmp_path: Any) -> None:
    """Kept as a verdict on the numerics, it would leave the other rank waiting, and be lost."""
    (tmp_path / "lame.py").write_text(
        "from torch import distributed, nn\n"
        "class Lame(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        if distributed.get_rank() == 1:\n"
        "            raise ValueError('only here')\n"
        "        return self.fc(x.flatten(1))\n"
    )
    with pytest.raises(UserCodeError, match="only here") as caught:
        pool.call(_try_with_path, str(tmp_path), task(model="lame:Lame"), ranks=2)
    assert caught.value.rank == 1


def test_a_loss_that_is_no_number_ends_the_trial(pool: Any) -> None:
    lost = task(optimizer={"name": "sgd", "lr": 1e30})
    (outcome, _) = pool.call(try_on_rank, lost, ranks=2)
    assert len(outcome["tried"]) == 1
    assert "the loss is" in outcome["reason"]


def _try_with_path(context: Any, folder: str, given: dict[str, Any]) -> Any:
    import sys

    sys.path.insert(0, folder)
    try:
        return try_on_rank(context, given)
    finally:
        sys.path.remove(folder)


def _trained(folder: Path, *options: str) -> dict[str, Any]:
    """A run of the command, choices and all; its cache is in `folder`."""
    command = [sys.executable, "-m", "shoal", "train", str(folder / "r.yaml"), "--json", *options]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(not computes_in_bf16(), reason="this processor has no instructions for bf16")
def test_a_run_says_what_auto_chose_and_the_next_one_knows_it(tmp_path: Path) -> None:
    recipe = Recipe.from_dict({**task()["recipe"], "model": "mlp"})
    recipe.to_yaml(tmp_path / "r.yaml")
    first = _trained(tmp_path, "--out", "first")
    choice = first["choices"][-1]
    assert "times as fast" in choice
    assert Run.open(tmp_path / "first").strategy.resolved() == first["strategy"]
    (remembered,) = (tmp_path / "cache/shoal/auto").iterdir()
    # A trial would find something else.
    tried = json.loads(remembered.read_text())
    tried[2]["step_s"] = tried[0]["step_s"] / 7
    remembered.write_text(json.dumps(tried))
    second = _trained(tmp_path, "--out", "second", "--set", "steps=3")
    assert second["choices"][-1].startswith(f"auto chose {tried[2]['strategy']}: 7.0 times")
    assert "+channels_last" in second["strategy"]
    assert "+bf16" not in second["strategy"]
