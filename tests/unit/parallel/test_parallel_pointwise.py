"""1×1 convolutions as products: the same numbers, and only where they fit."""

import copy

import pytest
import torch
from torch import nn

from shoal.parallel.pointwise import PointwiseConv, use_products


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(*shape, dtype=dtype)
    return made.to(memory_format=torch.channels_last).requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_a_product_is_the_convolution(stride, bias) -> None:
    plain = nn.Conv2d(6, 5, 1, stride=stride, bias=bias).double()
    ours = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert use_products(nn.Sequential(ours)) == 1
    inputs = [channels_last(3, 6, 5, 4, dtype=torch.float64) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [layer(x) for layer, x in zip((plain, ours), inputs, strict=True)]
    assert outputs[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.pow(3).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


class Doubling(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_what_is_no_plain_pointwise_convolution_is_left_alone() -> None:
    layers = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1, padding=1),
        Doubling(4, 4, 1), nn.Conv1d(4, 4, 1),
    )  # fmt: skip
    assert use_products(layers) == 0
    assert not any(isinstance(layer, PointwiseConv) for layer in layers)


@pytest.mark.parametrize(
    ("shape", "last", "dtype", "product"),
    [
        ((2, 4, 8, 8), True, torch.float32, True),
        ((2, 4, 8, 8), False, torch.float32, False),
        ((5, 4, 8, 8), True, torch.float32, False),
        ((5, 4, 8, 8), True, torch.bfloat16, True),
        ((80, 4, 8, 8), True, torch.bfloat16, False),
        ((2, 4, 8, 8), True, torch.float16, False),
        ((0, 4, 8, 8), True, torch.float32, False),
    ],
)
def test_each_call_chooses_by_its_rows(shape, last, dtype, product, monkeypatch) -> None:
    layer = nn.Conv2d(4, 6, 1).to(dtype)
    use_products(nn.Sequential(layer))
    called = []
    right = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: called.append(1) or right(*a))
    input = torch.randn(shape, dtype=dtype)
    layer(input.to(memory_format=torch.channels_last) if last else input)
    assert bool(called) is product


def test_under_autocast_the_limit_is_that_of_bf16(monkeypatch) -> None:
    layer = nn.Conv2d(4, 6, 1)
    use_products(nn.Sequential(layer))
    input = torch.randn(5, 4, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer._fits(input)
    assert not layer._fits(input)
