"""The model that a run begins with."""

import pytest
import torch
from torch import nn

from shoal.errors import Refused
from shoal.job.workload import Workload


def first_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    work = Workload(lambda: model, None, None, None, None, 0, 1)  # type: ignore[arg-type]
    return work.first_model(dtype)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(torch.float64, torch.complex128), (torch.float32, torch.complex64)],
)
def test_complex_buffers_keep_their_imaginary_part(dtype: torch.dtype, kept: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("turns", torch.tensor([1j, 1 + 1j]), persistent=False)
    model.register_buffer("count", torch.tensor(3))
    found = first_model(model, dtype)
    assert found.weight.dtype == dtype
    assert found.get_buffer("turns").dtype == kept
    assert found.get_buffer("turns").imag.tolist() == [1.0, 1.0]
    assert found.get_buffer("count").dtype == torch.int64


def test_complex_parameters_are_refused_by_name() -> None:
    model = nn.Module()
    model.phase = nn.Parameter(torch.tensor([1j]))
    with pytest.raises(Refused, match="the parameter phase is complex"):
        first_model(model, torch.float32)
