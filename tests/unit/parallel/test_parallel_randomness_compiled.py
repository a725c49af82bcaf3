"""Compiled models: functional dropout in a graph is refused, outside of one it is counted."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.errors import Refused
from shoal.parallel.randomness import StepKey, counted, use_counted_dropout
from shoal.parallel.randomness.compiling import counting_backend, keep_masks_uncompiled

ROWS = torch.arange(4)


class Model(nn.Module):
    def __init__(self, way: str, chance: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way, self.chance, self.linear = way, chance, nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=chance, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=chance, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.way == "dropout":
            return F.dropout(x, self.chance, self.training)
        if self.way == "scaled_dot_product_attention":
            return F.scaled_dot_product_attention(x, x, x, dropout_p=self.chance)
        if self.way == "encoder":
            return self.encoder(x)
        return self.attention(x, x, x)[0]


def steps(model: nn.Module) -> list[Tensor]:
    key = StepKey(0)
    key.intercepts = True
    use_counted_dropout(model, key)
    outputs = []
    for step in range(3):
        key.begin(step, ROWS, 0)
        with counted(key, model):
            outputs.append(model(torch.ones(4, 3, 8)).detach())
    return outputs


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Torch's, without the part that writes and compiles code."""
    import torch._dynamo as dynamo

    monkeypatch.setattr(dynamo, "lookup_backend", lambda _name: lambda graph, _inputs: graph)
    keep_masks_uncompiled()
    dynamo.reset()
    yield dynamo
    dynamo.reset()


WAYS = ["dropout", "scaled_dot_product_attention", "multi_head_attention_forward"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_dropout_in_a_graph_is_refused(compiler: Any, way: str) -> None:
    model = Model(way, 0.5)
    model.compile(dynamic=False, backend=counting_backend)
    with pytest.raises(compiler.exc.BackendCompilerFailed) as caught:
        steps(model)
    assert isinstance(caught.value.inner_exception, Refused)
    assert f"compile: {way} drops" in str(caught.value)
    assert "test_parallel_randomness_compiled.py" in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
def test_dropout_that_drops_nothing_is_compiled(compiler: Any, way: str) -> None:
    model = Model(way, 0.0)
    model.compile(dynamic=False, backend=counting_backend)
    for found, expected in zip(steps(model), steps(Model(way, 0.0)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_dropout_outside_of_a_graph_is_counted(compiler: Any) -> None:
    """An encoder layer has dropout layers, so it runs uncompiled, and its attention with it."""
    model = Model("encoder", 0.5)
    model.compile(dynamic=False, backend=counting_backend)
    found, expected = steps(model), steps(Model("encoder", 0.5))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(found[0], found[1])
