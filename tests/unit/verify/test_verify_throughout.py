"""What asks for float32 in a float64 verification gets float64, and nothing else changes."""

import pytest
import torch
from torch.nn import functional as F

from shoal.verify.throughout import Float64Throughout

WIDE = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

ASKS = {
    "to": lambda x: x.to(torch.float32),
    "to, by keyword": lambda x: x.to(dtype=torch.float32),
    "to, with a device": lambda x: x.to("cpu", torch.float32),
    "float": lambda x: x.float(),
    "type": lambda x: x.type(torch.float32),
    "softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1, dtype=torch.float32),
    "sum": lambda x: x.sum(-1, dtype=torch.float32),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_float64_stays(ask):
    assert ask(WIDE).dtype == torch.float32
    with Float64Throughout():
        kept = ask(WIDE)
    assert kept.dtype == torch.float64
    # The float32 answer, without its rounding.
    assert (kept - ask(WIDE).double()).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_other_types_are_left_alone(dtype):
    with Float64Throughout():
        assert torch.ones(3, dtype=dtype).to(torch.float32).dtype == torch.float32
        assert torch.ones(3, dtype=dtype).float().dtype == torch.float32


def test_what_float32_was_not_asked_for_is_left_alone():
    with Float64Throughout():
        assert WIDE.to(torch.int64).dtype == torch.int64
        assert WIDE.half().dtype == torch.float16
        assert WIDE.to("cpu").dtype == torch.float64
