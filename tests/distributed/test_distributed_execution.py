"""recompute, channels_last and bf16 on several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from onedevice import Case, batches_of, compare, images, of_kind, train_plainly, train_split
from torch import Tensor, nn

from shoal.models import ResNet, ResNetOptions

TOLERANCE = 1e-10


def resnet(**options: Any) -> Case:
    conv = options.pop("conv", "standard")
    shape = {"width": 4, "classes": 5, "in_channels": 2, "image_size": 16, "conv": conv}
    return Case(
        build=lambda: ResNet(ResNetOptions(**shape)),
        batches=batches_of(*images(50, channels=2), 25, 3),
        **options,
    )


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, {}), (2, {}), (3, {"normalize_over": 10}), (2, {"normalize_over": 5})],
    ids=["alone", "batch", "across", "within"],
)
def test_recompute_changes_nothing(
    pool: Any, ranks: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Running statistics included: a block that runs again must not be counted again."""
    case = resnet(**options, execution={"recompute": True})
    errors = compare(train_plainly(case), train_split(pool, ranks, case, tmp_path))
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("conv", ["standard", "depthwise_separable"])
def test_channels_last_changes_nothing(pool: Any, conv: str, tmp_path: Path) -> None:
    case = resnet(conv=conv, execution={"channels_last": True})
    errors = compare(train_plainly(case), train_split(pool, 3, case, tmp_path))
    assert max(errors.values()) <= TOLERANCE, errors


class Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(images).float()


def test_bf16_is_autocast(pool: Any, tmp_path: Path) -> None:
    """Close to one device's autocast, with parameters, gradients and buffers in float32."""
    case = resnet(dtype=torch.float32)
    build = case.build
    plain = Case(**{**vars(case), "build": lambda: Autocast(build())})
    expected = train_plainly(plain)
    ours = Case(**{**vars(case), "execution": {"bf16": True}})
    for trace in train_split(pool, 3, ours, tmp_path):
        for step in range(3):
            loss, reference = (t[f"{step}/loss/loss"].double() for t in (trace, expected))
            assert abs(loss - reference) <= 0.02 * reference
        for name, gradient in of_kind(trace, 0, "gradient").items():
            reference = expected[f"0/gradient/model.{name}"]
            assert gradient.dtype == torch.float32
            assert (gradient - reference).norm() <= 0.1 * reference.norm() + 1e-3, name
        kinds = {t.dtype for key, t in trace.items() if "/output/" not in key}
        assert kinds <= {torch.float32, torch.float64, torch.int64}  # float64: the loss


class Normal(nn.Module):
    """A norm across ranks, where the compiled graph breaks, and another layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)

    def forward(self, rows: Tensor) -> Tensor:
        return self.after(torch.tanh(self.norm(self.before(rows))))


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 3])
def test_compiling_changes_nothing(pool: Any, ranks: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, targets = torch.randn(52, 8, generator=generator), torch.arange(52) % 5
    case = Case(
        build=Normal, batches=batches_of(rows, targets, 50, 4), execution={"compiled": True}
    )
    errors = compare(train_plainly(case), train_split(pool, ranks, case, tmp_path))
    assert max(errors.values()) <= TOLERANCE, errors
