"""Batch norm over rows on several ranks beside torch.nn.BatchNorm on the whole batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from onedevice import Case, assembled, batches_of, compare, images, train_plainly, train_split
from torch import Tensor, nn

from shoal.errors import Refused, RunError

TOLERANCE = 1e-10


class Norm(nn.Module):
    """One norm between a layer that learns and one that sums up, so that gradients pass through."""

    def __init__(self, norm: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.before, self.norm = nn.Parameter(torch.randn(shape)), norm
        self.head = nn.Linear(shape[0], 5)

    def forward(self, input: Tensor) -> Tensor:
        normal = torch.tanh(self.norm(input * self.before + input.square()))
        return self.head(normal.flatten(2).mean(2) if normal.dim() > 2 else normal)


def over(
    shape: tuple[int, ...], norm: Callable[[], nn.Module], examples: int = 63, **options: Any
) -> Case:
    generator = torch.Generator().manual_seed(2)
    # A mean far from zero: variances made of differences of squares would lose digits.
    inputs = torch.randn(examples, *shape, generator=generator) + 100.0
    targets = torch.randint(0, 5, (examples,), generator=generator)
    batches = batches_of(inputs, targets, 30, 4)
    return Case(build=lambda: Norm(norm(), shape), batches=batches, **options)


PLAIN = (4,)
CASES: dict[str, Callable[[], Case]] = {
    "1d": lambda: over(PLAIN, lambda: nn.BatchNorm1d(4)),
    "1d with a length": lambda: over((4, 6), lambda: nn.BatchNorm1d(4)),
    "2d": lambda: over((4, 3, 2), lambda: nn.BatchNorm2d(4)),
    "3d": lambda: over((4, 3, 2, 2), lambda: nn.BatchNorm3d(4)),
    "cumulative": lambda: over(PLAIN, lambda: nn.BatchNorm1d(4, momentum=None)),
    "no weight": lambda: over(PLAIN, lambda: nn.BatchNorm1d(4, affine=False)),
    "no running statistics": lambda: over(
        PLAIN, lambda: nn.BatchNorm1d(4, track_running_stats=False)
    ),
    "groups on one rank": lambda: over((4, 3, 2), lambda: nn.BatchNorm2d(4), normalize_over=15),
    "groups across ranks": lambda: over((4, 3, 2), lambda: nn.BatchNorm2d(4), normalize_over=7),
    "one example left, on one rank": lambda: over((4, 3, 2), lambda: nn.BatchNorm2d(4), 61),
    "groups, cumulative": lambda: over(
        (4, 3), lambda: nn.BatchNorm1d(4, momentum=None), normalize_over=10
    ),
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_statistics_are_the_whole_batchs(pool: Any, name: str, ranks: int, tmp_path: Path) -> None:
    case = CASES[name]()
    errors = compare(train_plainly(case), train_split(pool, ranks, case, tmp_path))
    assert max(errors.values()) <= TOLERANCE, errors


class Crops(nn.Module):
    """Looks at each image twice: its norm gets two rows an example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        crops = torch.stack((images[..., :12, :12], images[..., 4:, 4:]), 1).flatten(0, 1)
        features = torch.tanh(self.norm(self.conv(crops)))
        return self.head(features.mean((2, 3))).view(len(images), 2, 5).mean(1)


def test_several_rows_of_an_example(pool: Any, tmp_path: Path) -> None:
    case = Case(build=Crops, batches=batches_of(*images(50), 25, 2))
    errors = compare(train_plainly(case), train_split(pool, 3, case, tmp_path))
    assert max(errors.values()) <= TOLERANCE, errors


def _evaluate_without_running_statistics(groups: Any, case: Case) -> list[float]:
    from shoal.job import local_batch

    job = assembled(groups, case)
    job.replica.model.eval()
    batch, share = local_batch(job.workload.feed, 0, groups.data.rank, job.replica, 0)
    return job.replica.forward(batch, 0, share).flatten().tolist()


def test_evaluation_without_running_statistics(pool: Any) -> None:
    case = over(PLAIN, lambda: nn.BatchNorm1d(4, track_running_stats=False))
    torch.manual_seed(case.seed)
    model = case.build().double().eval()
    expected = model(case.batches[0][0].double()).flatten()
    parts = pool.run(_evaluate_without_running_statistics, case, ranks=3)
    found = [value for part in parts for value in part]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected)


# ---- what cannot be done is said


class OwnForward(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _error_of(groups: Any, case: Case) -> str:
    from shoal.train.step import Flags, train_step

    try:
        job = assembled(groups, case)
        train_step(job, 0, Flags())
    except (Refused, RunError) as error:
        return type(error).__name__ + ": " + str(error)
    return ""


def test_a_norm_with_a_forward_of_its_own_is_refused(pool: Any) -> None:
    for said in pool.run(_error_of, over(PLAIN, lambda: OwnForward(4)), ranks=2):
        assert said.startswith("Refused: norm is a OwnForward")


def test_a_group_of_a_single_value_is_refused_on_every_rank(pool: Any) -> None:
    case = over(PLAIN, lambda: nn.BatchNorm1d(4), normalize_over=29)
    for said in pool.run(_error_of, case, ranks=3):
        assert "statistics group 1 holds one value per channel" in said
