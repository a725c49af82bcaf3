"""What the ranks do where `auto` lets them try other numerics."""

from typing import Any

import pytest

from shoal.train.entry import try_on_rank


def task(**changes: Any) -> dict[str, Any]:
    recipe = {
        "name": "small",
        "batch_size": 16,
        "steps": 240,
        "model": {"name": "resnet", "depth": 18, "width": 4, "stem": "small"},
        "data": {"train": "digits:train"},
        "objective": "cross_entropy",
        "optimizer": {"name": "sgd", "lr": 0.01},
    }
    return {"recipe": recipe | changes, "strategy": "dp2", "device": "cpu"}


def test_each_candidate_trains_from_the_same_weights_on_the_same_batches(pool: Any) -> None:
    outcomes = pool.call(try_on_rank, task(), ranks=2)
    assert outcomes[0] == outcomes[1]
    plain, both, layout = outcomes[0]["tried"]
    assert [each["strategy"] for each in outcomes[0]["tried"]] == [
        "dp2",
        "dp2+bf16+channels_last",
        "dp2+channels_last",
    ]
    assert all(each["failed"] is None and each["step_s"] > 0 for each in (plain, both, layout))
    assert len(plain["losses"]) == 6
    # The memory format changes rounding alone, bf16 more than that.
    assert layout["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert both["losses"] != plain["losses"]
    assert both["losses"][0] == pytest.approx(plain["losses"][0], rel=0.05)


def test_short_runs_try_nothing(pool: Any) -> None:
    (outcome, _) = pool.call(try_on_rank, task(steps=239), ranks=2)
    assert outcome["tried"] == []
    assert "239 steps are too few" in outcome["reason"]


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


def _try_with_path(context: Any, folder: str, given: dict[str, Any]) -> Any:
    import sys

    sys.path.insert(0, folder)
    try:
        return try_on_rank(context, given)
    finally:
        sys.path.remove(folder)
