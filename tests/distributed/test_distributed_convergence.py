"""A convex problem with a known optimum: each member gets there as fast as its theory says.

Least squares without noise: f_r(w) = mean of |(w - w*) x|² over the examples of replica r. All f_r
have their minimum at w*, and are μ-strongly convex and L-smooth, so that a step of size η ≤ 1/L
shortens |w - w*| by 1 - η μ at least, on any replica.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from apart import cuts, saved, train_apart
from onedevice import Case
from torch import Tensor, nn

EXAMPLES, FEATURES, OUTPUTS, RATE = 96, 6, 4, 0.05
OPTIMUM = torch.arange(24, dtype=torch.float64).view(OUTPUTS, FEATURES).sin()


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(EXAMPLES, FEATURES, generator=generator, dtype=torch.float64)


def squares(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return (outputs - targets).square().sum(), torch.tensor(float(len(targets)))


def problem(steps: int, x: Tensor) -> Case:
    y = x @ OPTIMUM.T
    return Case(
        build=lambda: nn.Linear(FEATURES, OUTPUTS, bias=False),
        batches=[(x, y)] * steps,
        loss=nn.functional.mse_loss,
        objective=squares,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=RATE),
    )


def curvatures(x: Tensor) -> Tensor:
    """Eigenvalues of the second derivative of the mean over these examples, ascending."""
    return torch.linalg.eigvalsh(2 * x.T @ x / len(x))


def slowest(replicas: int) -> float:
    """1 - η μ, of the replica that is worst off."""
    of_each = [curvatures(inputs()[start:stop]) for start, stop in cuts(EXAMPLES, replicas)]
    assert max(float(each[-1]) for each in of_each) <= 1 / RATE
    return 1 - RATE * min(float(each[0]) for each in of_each)


def error(weights: Tensor) -> float:
    return float((weights - OPTIMUM).norm())


def first_error() -> float:
    torch.manual_seed(Case.seed)
    return error(nn.Linear(FEATURES, OUTPUTS, bias=False).double().weight.detach())


def errors(pool: Any, text: str, folder: Path, steps: int, x: Tensor) -> list[float]:
    """Of each replica at the end; of the centre where there is one."""
    train_apart(pool, problem(steps, x), text, folder)
    tensors = saved(folder, steps)
    found = [t for n, t in tensors.items() if n.rpartition("/")[2] in ("weight", "sync.center")]
    assert found
    return [error(t) for t in found]


STEPS = 120


@pytest.mark.parametrize(
    "text", ["dp3", "dp3/local:5", "dp4/gossip:ring", "dp3/gossip:exponential", "dp2/local:50"]
)
def test_means_shorten_the_way_at_each_step(pool: Any, tmp_path: Path, text: str) -> None:
    """A mean is never further from w* than the furthest; so |w - w*| ≤ (1 - η μ)^T |w₀ - w*|."""
    bound = slowest(int(text[2])) ** STEPS * first_error()
    assert max(errors(pool, text, tmp_path, STEPS, inputs())) <= bound


def test_elastic_averaging_shortens_the_way(pool: Any, tmp_path: Path) -> None:
    """With ρ = (1 - η μ)^H, (|w|, |c|) is at most [[(1-α)ρ, α], [nαρ, 1-nα]] times that before."""
    n, every, alpha = 3, 4, 0.25
    rho = slowest(n) ** every
    round_ = torch.tensor([[(1 - alpha) * rho, alpha], [n * alpha * rho, 1 - n * alpha]])
    start = torch.full((2,), first_error())
    bound = torch.linalg.matrix_power(round_.double(), STEPS // every) @ start.double()
    found = errors(pool, f"dp{n}/easgd:{every}:alpha={alpha}", tmp_path, STEPS, inputs())
    assert len(found) == 2 * n
    assert max(found) <= float(bound.max())
    assert float(bound.max()) < first_error() / 10


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (0.5, 0.0), (1.0, 0.5)])
def test_outer_steps_follow_their_recurrence(
    pool: Any, tmp_path: Path, lr: float, momentum: float
) -> None:
    """With the same examples on each replica, along each direction of curvature κ

    Δ = (1 - (1 - η κ)^H) e,    m ← μ m + Δ,    e ← e - lr (Δ + μ m),    which tends to zero.
    """
    every, steps = 5, 200
    x = inputs()[: EXAMPLES // 2].repeat(2, 1)
    values, vectors = torch.linalg.eigh(2 * x.T @ x / len(x))
    torch.manual_seed(Case.seed)
    start = nn.Linear(FEATURES, OUTPUTS, bias=False).double().weight.detach()
    e = (start - OPTIMUM) @ vectors
    m = torch.zeros_like(e)
    for _ in range(steps // every):
        change = (1 - (1 - RATE * values) ** every) * e
        m = momentum * m + change
        e = e - lr * (change + momentum * m)
    text = f"dp2/diloco:{every}:lr={lr}:momentum={momentum}"
    for found in errors(pool, text, tmp_path, steps, x):
        assert found == pytest.approx(float(e.norm()), rel=1e-8)
    assert float(e.norm()) < first_error() / 10


@pytest.mark.parametrize("method", ["topk=25", "powersgd=1"])
def test_with_errors_fed_back_it_gets_there(pool: Any, tmp_path: Path, method: str) -> None:
    """f(w) - f(w*) ≤ O(L |w₀ - w*|²) (1 - η μ / 2)^T for η small beside δ / L, δ the share of the
    square that is sent (Stich and Karimireddy 2020, without noise).
    """
    curvature = curvatures(inputs())
    low, high = float(curvature[0]), float(curvature[-1])
    assert high * RATE <= 1 / 3
    found = errors(pool, f"dp3/compress:{method}", tmp_path, STEPS, inputs())
    assert max(found) ** 2 <= (high / low) * (1 - RATE * low / 2) ** STEPS * first_error() ** 2
    assert max(found) < first_error() / 100
