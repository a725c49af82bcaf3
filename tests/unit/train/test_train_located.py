"""Errors say where they came from, and memory that ran out is told in words."""

import pytest
import torch

from shoal.errors import OutOfMemory, RunError
from shoal.train.located import located


def test_memory_that_the_processor_has_not_got():
    with (
        pytest.raises(OutOfMemory, match=r"rank 1, step 5: out of memory: .* \d+ bytes") as caught,
        located(1, 5),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert "zero3" in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")],
    ids=["python", "cuda"],
)
def test_memory_that_python_or_a_gpu_has_not_got(error):
    with pytest.raises(OutOfMemory), located(0):
        raise error


def test_another_error_of_the_same_type_is_not_taken_for_it():
    with pytest.raises(RunError, match="RuntimeError: shapes do not fit") as caught, located(0):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(caught.value, OutOfMemory)
