"""A model in stages trains as on one device, whatever it sends past its stages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from onedevice import Case, batches_of
from staged import How, compare_staged
from torch import nn

LIMIT = 1e-10


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 13), nn.ReLU(), nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 11), nn.GELU(),
        nn.Linear(11, 9), nn.ReLU(), nn.Linear(9, 5),
    )  # fmt: skip


def rows(examples: int, features: int = 6) -> Any:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(examples, features, generator=generator)
    return inputs, torch.randint(0, 5, (examples,), generator=generator)


MLP = Case(build=mlp, batches=batches_of(*rows(43), 20, 4), clip_norm=0.1)


def check(errors: dict[str, float]) -> None:
    assert max(errors.values()) <= LIMIT, errors


@pytest.mark.parametrize(
    ("method", "chunks"),
    [("gpipe", None), ("1f1b", None), ("interleaved", 2), ("zb", 1), ("zb", 2), ("zbv", None)],
)
@pytest.mark.parametrize("microbatches", [1, 7])
def test_every_schedule(
    pool: Any, tmp_path: Path, method: str, chunks: int | None, microbatches: int
) -> None:
    # 20, 20, 3 rows: the last step has fewer rows than microbatches.
    how = How(method, microbatches, chunks)
    check(compare_staged(pool, (("pp", 2),), MLP, tmp_path, how))
