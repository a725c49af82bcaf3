"""Asynchronous SGD: the bound, the order, beside a plain loop; NaN, a stopped worker, servers."""

import random
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asynchronous import How, simulate, train
from onedevice import Case, adamw, batches_of, images
from torch import Tensor, nn

from shoal.models import ResNet, ResNetOptions, mlp


def small(steps: int = 8, **options: Any) -> Case:
    """A perceptron: batches of 50, 50 and 3 examples, then from the beginning."""
    plain = {"build": lambda: mlp(256, 5, [16]), "batches": batches_of(*images(103), 50, steps)}
    return Case(**{**plain, **options})


def schedule(steps: int, each: int, bound: int) -> list[dict[str, Any]]:
    """A ledger with every staleness that the bound allows."""
    return [
        {"step": step, "index": index, "computed_on": max(0, step - (step + index) % (bound + 1))}
        for step in range(steps)
        for index in range(each)
    ]


class Tied(nn.Module):
    """Two layers with one weight, another that nothing uses, and a table with infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 256)
        self.second.weight = self.first.weight
        self.unused, self.last = nn.Linear(3, 3), nn.Linear(256, 5)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.flatten(1)).tanh()
        outputs: Tensor = self.last(self.second(hidden).tanh())
        return outputs


@pytest.mark.parametrize(
    ("ranks", "options", "how"),
    [
        (2, {}, How(2)),
        (2, {"clip_norm": 0.5, "optimizer": adamw}, How(2)),
        (2, {}, How(2, compensate=2.0)),
        (2, {"optimizer": adamw}, How(2, damp=0.5)),
        # The batch of 3 leaves one worker without examples.
        (4, {"clip_norm": 0.5}, How(2, compensate=1.0, damp=1.0)),
        (3, {}, How(2, servers=1)),
        (2, {"build": lambda: Tied()}, How(2)),
    ],
)
def test_a_schedule_gives_what_a_plain_loop_over_it_gives(
    pool: Any, tmp_path: Path, ranks: int, options: Any, how: How
) -> None:
    case, each = small(**options), ranks - how.servers
    how = replace(how, past=schedule(8, each, 2))
    ran = train(pool, ranks, case, how, tmp_path)
    assert [(line["step"], line["index"]) for line in ran.ledger] == [
        (step, index) for step in range(8) for index in range(each)
    ]
    wanted = {(line["step"], line["index"]): line["computed_on"] for line in how.past}
    assert {(line["step"], line["index"]): line["computed_on"] for line in ran.ledger} == wanted
    assert max(line["staleness"] for line in ran.ledger) == 2
    expected = simulate(case, how.past, how, each)
    for name, tensor in expected.items():
        torch.testing.assert_close(ran.weights[name], tensor, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("ranks", "servers", "options"),
    [
        (3, 0, {"clip_norm": 0.5, "optimizer": adamw}),
        # No worker's share is a single row, which batch norm refuses.
        (4, 2, {"build": lambda: normed(), "batches": batches_of(*images(100), 50, 8)}),
    ],
)
def test_copies_of_an_owners_part_have_the_same_bits(
    pool: Any, tmp_path: Path, ranks: int, servers: int, options: Any
) -> None:
    case, each = small(**options), ranks - servers
    how = How(2, servers, 1.0, copies=1, past=schedule(8, each, 2))
    ran = train(pool, ranks, case, how, tmp_path)  # which compares them
    if "build" not in options:  # the plain loop knows no running statistics
        expected = simulate(case, how.past, how, each)
        for name, tensor in expected.items():
            torch.testing.assert_close(ran.weights[name], tensor, rtol=1e-11, atol=1e-12)


def normed() -> nn.Module:
    """With running statistics, which are buffers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.BatchNorm1d(16), nn.Linear(16, 5))


class Jittery(nn.Module):
    """Waits before each forward pass, for as long as its own dice say."""

    def __init__(self, seed: int, longest_s: float = 0.01) -> None:
        super().__init__()
        self.inner = mlp(256, 5, [16])
        self._dice, self._longest_s = random.Random(seed), longest_s

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self._dice.random() * self._longest_s)
        outputs: Tensor = self.inner(x)
        return outputs


@pytest.mark.parametrize(("ranks", "bound", "seed"), [(2, 1, 0), (3, 2, 1), (4, 3, 2)])
def test_the_bound_holds_under_random_delays_and_a_replay_gives_the_same_bits(
    pool: Any, tmp_path: Path, ranks: int, bound: int, seed: int
) -> None:
    case = small(12, build=lambda: Jittery(0, 0.0))
    builds = {
        rank: lambda rank=rank: Jittery(seed * 10 + rank, 0.02 if rank == 1 else 0.005)
        for rank in range(ranks)
    }
    ran = train(pool, ranks, case, How(bound, builds=builds, boundary_every=7), tmp_path)
    keys = [(line["step"], line["index"]) for line in ran.ledger]
    assert keys == [(step, index) for step in range(12) for index in range(ranks)]
    assert all(line["applied_at"] == line["step"] for line in ran.ledger)
    assert all(line["staleness"] == line["applied_at"] - line["computed_on"] for line in ran.ledger)
    assert all(0 <= line["staleness"] <= bound for line in ran.ledger)
    # Nothing of a step is computed on a version before a boundary that lies between.
    assert all(line["computed_on"] >= 7 for line in ran.ledger if line["step"] >= 7)
    assert ran.losses == [ran.losses[0]] * ranks  # all ranks are told the same

    how = How(bound, past=ran.ledger, boundary_every=5)
    again = train(pool, ranks, case, how, tmp_path / "again")
    assert [each["computed_on"] for each in again.ledger] == [
        each["computed_on"] for each in ran.ledger
    ]
    assert all(torch.equal(again.weights[name], ran.weights[name]) for name in ran.weights)


class Held(nn.Module):
    """Its first forward pass waits for a file, which another's `at`-th writes.

    ``begun``: a file that the one that waits writes first, and that the other waits for.
    """

    def __init__(self, file: Path, at: int | None, begun: Path | None = None) -> None:
        super().__init__()
        self.inner = mlp(256, 5, [16])
        self._file, self._at, self._begun, self._calls = file, at, begun, 0

    def forward(self, x: Tensor) -> Tensor:
        self._calls += 1
        if self._begun is not None and self._at is None:
            self._begun.touch()
        self._wait_for(self._file if self._at is None else self._begun)
        if self._calls == self._at:
            self._file.touch()
        outputs: Tensor = self.inner(x)
        return outputs

    def _wait_for(self, file: Path | None) -> None:
        while file is not None and not file.exists():
            time.sleep(0.002)


@pytest.mark.parametrize("bound", [1, 3])
def test_others_go_on_to_the_bound_while_one_is_held(pool: Any, tmp_path: Path, bound: int) -> None:
    free = 2 * (bound + 1) - 1  # all contributions of the steps 0 … S, but the one that is held
    go_on, begun = tmp_path / "go on", tmp_path / "begun"
    # Rank 0 may not be done with everything before rank 1 has asked for anything.
    builds = {0: lambda: Held(go_on, free, begun), 1: lambda: Held(go_on, None, begun)}
    case = small(6, build=lambda: Held(tmp_path / "never", 0))
    ran = train(pool, 2, case, How(bound, builds=builds), tmp_path)
    first = [line for line in ran.ledger if line["step"] <= bound]
    assert Counter(line["worker"] for line in first) == {0: free, 1: 1}
    assert max(line["staleness"] for line in ran.ledger) == bound


class Poisoned(nn.Module):
    """Gives NaN in the calls that it is told."""

    def __init__(self, calls: range) -> None:
        super().__init__()
        self.inner = mlp(256, 5, [16])
        self._bad, self._calls = calls, 0

    def forward(self, x: Tensor) -> Tensor:
        self._calls += 1
        outputs: Tensor = self.inner(x)
        return outputs * float("nan") if self._calls in self._bad else outputs


def test_what_is_not_finite_is_refused_and_the_others_count(pool: Any, tmp_path: Path) -> None:
    case = small(9, build=lambda: Poisoned(range(0)))
    builds = {1: lambda: Poisoned(range(2, 4))}
    how = How(2, builds=builds)
    ran = train(pool, 3, case, how, tmp_path)
    refused = [line for line in ran.ledger if line.get("refused")]
    assert [line["worker"] for line in refused] == [1] * len(refused)
    assert len(refused) == ran.counts["refused"]
    assert [event[0] for event in ran.events] == ["refused"] * len(refused)
    assert 1 <= len(refused) <= 2  # another may have been quicker to claim
    expected = simulate(case, ran.ledger, how, 3)
    for name, tensor in expected.items():
        torch.testing.assert_close(ran.weights[name], tensor, rtol=1e-11, atol=1e-12)
    # A replay leaves out the same.
    again = train(pool, 3, case, How(2, past=ran.ledger), tmp_path / "again")
    assert all(torch.equal(again.weights[name], ran.weights[name]) for name in ran.weights)


def test_where_nothing_is_finite_the_run_ends_on_all_ranks(pool: Any, tmp_path: Path) -> None:
    case = small(6, build=lambda: Poisoned(range(100)))
    ran = train(pool, 2, case, How(1), tmp_path)
    assert [step for _, step in ran.errors] == [0, 0]
    assert ran.errors[0] == ran.errors[1]


def test_a_worker_that_stands_still_loses_its_claim_and_what_it_computed(
    pool: Any, tmp_path: Path
) -> None:
    file = tmp_path / "go on"
    # Rank 0 keeps the weights. Rank 1 can only come so far if it gets what rank 2 holds.
    # And it may not be done with everything before rank 2 has begun.
    begun = tmp_path / "begun"
    builds = {1: lambda: Held(file, 10, begun), 2: lambda: Held(file, None, begun)}
    case = small(6, build=lambda: Held(tmp_path / "never", 0))
    how = How(1, servers=1, builds=builds, impatient=True)
    ran = train(pool, 3, case, how, tmp_path)
    assert ran.counts["taken_back"] >= 1
    assert {"taken back", "discarded"} <= {event[0] for event in ran.events}
    assert len(ran.ledger) == 12  # each contribution counts once
    expected = simulate(case, ran.ledger, how, 2)
    for name, tensor in expected.items():
        torch.testing.assert_close(ran.weights[name], tensor, rtol=1e-11, atol=1e-12)


def test_running_statistics_are_the_mean_of_what_contributions_make_of_them(
    pool: Any, tmp_path: Path
) -> None:
    shape = {"width": 4, "classes": 5, "in_channels": 1, "image_size": 16}
    case = small(3, build=lambda: ResNet(ResNetOptions(**shape)))
    ran = train(pool, 2, case, How(1, past=schedule(3, 2, 1)), tmp_path)
    counted = [each for name, each in ran.weights.items() if name.endswith("num_batches_tracked")]
    assert {int(each) for each in counted} == {3}
    means = [each for name, each in ran.weights.items() if name.endswith("running_mean")]
    assert all(bool(mean.abs().max() > 0) for mean in means)


def test_a_convex_problem_is_solved(pool: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    best = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    targets = inputs @ best.T  # the optimum is known, and every batch agrees with it

    def squares(outputs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        return ((outputs - wanted) ** 2).sum(), torch.tensor(float(len(wanted)))

    case = Case(
        build=lambda: nn.Linear(4, 1, bias=False),
        batches=batches_of(inputs, targets, 16, 240),
        objective=squares,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    )
    for bound in (1, 2):
        ran = train(pool, 2, case, How(bound), tmp_path / str(bound))
        # With staleness S gradient descent of a quadratic is stable up to lr ~ 1 ÷ (L (S + 1)).
        torch.testing.assert_close(ran.weights["weight"], best, rtol=0.0, atol=1e-6)
