"""What ranks of a model that is cut send in one training step, byte for byte as the closed form.

Replicas and ZeRO beside whole models are in test_distributed_zero.
"""

from typing import Any

import pytest
import torch
from onedevice import Case, adamw, assembled, batches_of
from torch import Tensor, nn

from shoal.strategy import Strategy

ROWS, FEATURES, WIDTH, INNER, CLASSES = 8, 6, 8, 12, 4
METRIC = 8 * (2 + 4)  # loss and count, and what ranks decide together, in float64
FLOAT = 4


class Residual(nn.Module):
    """Two layers beside a skip: what expands and contracts again."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.relu(self.widen(x)))


class Net(nn.Module):
    """A layer that stays whole, two pairs that are cut, and a norm that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(FEATURES, WIDTH), nn.LayerNorm(WIDTH)
        self.blocks = nn.Sequential(Residual(), Residual())
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.norm(torch.tanh(self.first(x)))))


def case_of(strategy: str, build: Any = Net) -> Case:
    made = torch.Generator().manual_seed(1)
    rows = torch.randn(2 * ROWS, FEATURES, generator=made)
    chosen = Strategy.parse(strategy)
    execution = {
        "zero": chosen.zero.stage if chosen.zero else 0,
        "microbatches": chosen.microbatches,
        "staged": chosen.pp * chosen.tp > 1,
    }
    return Case(
        build=build,
        batches=batches_of(rows, torch.arange(2 * ROWS) % CLASSES, ROWS, 2),
        optimizer=adamw,
        dtype=torch.float32,
        execution=execution,
    )


def _step(groups: Any, case: Case) -> dict[str, Any]:
    """Bytes of the second step (in the first one shapes are agreed), and what this rank holds."""
    from shoal.train.step import Flags, train_step

    job = assembled(groups, case)
    train_step(job, 0, Flags())
    before = groups.world.counter.as_dict()
    train_step(job, 1, Flags())
    after = groups.world.counter.as_dict()
    sent = {
        f"{collective}/{purpose}": count - before.get(collective, {}).get(purpose, 0)
        for collective, purposes in after.items()
        for purpose, count in purposes.items()
        if count - before.get(collective, {}).get(purpose, 0)
    }
    held = {name: p.numel() for name, p in job.replica.model.named_parameters()}
    return {"sent": sent, "held": held}


def steps(pool: Any, strategy: str, build: Any = Net) -> list[dict[str, Any]]:
    chosen = Strategy.parse(strategy)
    found: list[dict[str, Any]] = pool.run(
        _step, case_of(strategy, build), ranks=chosen.world_size, axes=chosen.axes
    )
    return found


def gradients_of(held: dict[str, int]) -> dict[str, int]:
    """All-reduced over the replicas: what a rank holds, and which of it was used."""
    return {
        "all_reduce/gradient": FLOAT * sum(held.values()),
        "all_reduce/agreement": FLOAT * len(held),
    }


class Skips(nn.Module):
    """Layers of one width with a value from the first one that the last one needs again.

    Wherever it is cut, two values of [rows, WIDTH] cross, or the skip alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.middle = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6))
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        skip = x = torch.tanh(self.first(x))
        for layer in self.middle:
            x = torch.tanh(layer(x))
        return self.last(x * skip)


# Live values at the only balanced cuts, in numbers of each row.
CROSSING = {Net: WIDTH, Skips: 2 * WIDTH}


@pytest.mark.parametrize("build", [Net, Skips])
@pytest.mark.parametrize("strategy", ["pp2/gpipe/mb:4", "pp2/1f1b/mb:3", "pp2/1f1b/mb:1"])
def test_a_pipeline_sends_live_values_and_their_gradients(
    pool: Any, strategy: str, build: Any
) -> None:
    """Each row's values once forwards, from the first rank; their gradients once backwards."""
    crossing = FLOAT * ROWS * CROSSING[build]
    for found in steps(pool, strategy, build):
        assert found["sent"] == {"send/activation": crossing, "all_reduce/metric": METRIC}


def test_a_pipeline_of_replicas_also_sums_each_stages_gradients(pool: Any) -> None:
    crossing = FLOAT * ROWS // 2 * CROSSING[Net]
    found = steps(pool, "pp2.dp2/mb:2")
    names = {name for rank in found for name in rank["held"]}
    assert names == {name for name, _ in Net().named_parameters()}
    for rank in found:
        assert rank["sent"] == {
            "send/activation": crossing,
            "all_reduce/metric": METRIC,
            **gradients_of(rank["held"]),
        }


def of_tensor(rows: int) -> dict[str, int]:
    """Each pair sums its output forwards, and the gradient of its input backwards."""
    return {"all_reduce/activation": 2 * 2 * FLOAT * rows * WIDTH}


def held_by_tensor_ranks() -> int:
    """Numbers: the weights of a pair and its inner bias in halves; the rest whole."""
    pair = 2 * WIDTH * INNER + INNER
    whole = sum(p.numel() for p in Net().parameters())
    return whole - 2 * (pair - pair // 2)


def test_tensor_parallel_pairs_sum_twice(pool: Any) -> None:
    for found in steps(pool, "tp2"):
        assert sum(found["held"].values()) == held_by_tensor_ranks()
        assert found["sent"] == {**of_tensor(ROWS), "all_reduce/metric": METRIC}


def test_replicas_of_tensor_parallel_models_also_sum_their_parts(pool: Any) -> None:
    for found in steps(pool, "dp2.tp2"):
        assert sum(found["held"].values()) == held_by_tensor_ranks()
        assert found["sent"] == {
            **of_tensor(ROWS // 2),
            "all_reduce/metric": METRIC,
            **gradients_of(found["held"]),
        }
