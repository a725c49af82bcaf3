"""A sequential model that cannot be traced runs as its children do, one operation each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.errors import Refused, UserCodeError
from shoal.trace import Traced, trace


class Clips(nn.Module):
    """Does something else where the values are large: no list of operations knows it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(-1, 1) if bool((x.abs() > 1).any()) else x * 0.5


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.left(x)), self.right(x)


class Join(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return {"sum": pair[0] + pair[1], "parts": [pair[0]], "name": "join"}


class Counts(nn.Module):
    """Assigns a buffer, and changes another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return x + self.calls


def clipped(*others: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), Clips(), *others, nn.Linear(6, 6))


def run(traced: Traced, model: nn.Module, inputs: Any, boundaries: list[int]) -> Any:
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    values: dict[str, Any] = dict(zip(traced.inputs, traced.flatten(inputs), strict=True))
    outputs: tuple[str, ...] = ()
    for segment in traced.segment(boundaries):
        values |= segment.callable()(values | state)
        outputs = segment.outputs
    return traced.rebuild([values[name] for name in outputs])


def forked() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), Clips(), Fork(), Join())


def tied() -> nn.Sequential:
    model = clipped(nn.Sequential(nn.Tanh(), nn.Linear(6, 6)))
    model[3].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("build", "operations"),
    [
        (clipped, 3),
        (forked, 8),
        (tied, 5),
        (lambda: clipped(nn.BatchNorm1d(6), nn.ReLU(inplace=True)), 4),
        (lambda: clipped(Counts()), 4),
    ],
)
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_computes_what_the_model_does(
    build: Callable[[], nn.Sequential], operations: int, rows: int
) -> None:
    torch.manual_seed(0)
    model = build().eval() if rows == 1 else build()
    traced = trace(model, torch.randn(4, 6), 4)
    assert len(traced.ops) == operations
    boundaries = [b for b in range(1, len(traced.ops)) if b not in traced.forbidden]
    inputs, found = torch.randn(rows, 6) * 2, []
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for call in (lambda: model(inputs), lambda: run(traced, model, inputs, boundaries)):
        model.load_state_dict(start, strict=False)
        model.zero_grad()
        output = call()
        total = output["sum"] + output["parts"][0] if isinstance(output, dict) else output
        total.square().sum().backward()
        of_state = [b.clone() for b in model.buffers()] + [p.grad for p in model.parameters()]
        found.append([total, *of_state])
        assert not isinstance(output, dict) or output["name"] == "join"
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_tracing_leaves_everything_as_it_was() -> None:
    model = clipped(Counts(), nn.BatchNorm1d(6), nn.Dropout(0.5))
    before = [tensor.clone() for tensor in model.state_dict().values()]
    objects = [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    inputs, generator = torch.randn(4, 6), torch.get_rng_state()
    kept = inputs.clone()
    trace(model, inputs, 4)
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.equal(inputs, kept)
    assert objects == [id(tensor) for tensor in model.state_dict(keep_vars=True).values()]
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert model.training


def test_layers_that_belong_together_are_one_operation() -> None:
    norm = nn.BatchNorm1d(6)
    assert len(trace(clipped(norm, nn.Linear(6, 6), norm), torch.randn(4, 6), 4).ops) == 4
    # Linear, Flatten, ReLU in place of what Linear has made: one memory.
    model = clipped(nn.Linear(6, 6), nn.Flatten(), nn.ReLU(inplace=True))
    assert len(trace(model, torch.randn(4, 6), 4).ops) == 4
    drop = nn.Dropout()
    assert len(trace(clipped(drop, nn.Tanh(), drop), torch.randn(4, 6), 4).ops) == 4
    relu = nn.ReLU()
    assert len(trace(clipped(relu, nn.Tanh(), relu), torch.randn(4, 6), 4).ops) == 6


def test_costs_and_crossing_are_those_of_the_children() -> None:
    model = nn.Sequential(nn.Linear(6, 60), Clips(), nn.Linear(60, 3), nn.Tanh())
    traced = trace(model, torch.randn(4, 6), 4)
    assert traced.crossing()[1:4] == [240, 240, 12]
    costs = [traced.costs[node.name] for node in traced.ops]
    assert costs[0] > costs[2] > costs[3] > 0


def test_what_is_not_sequential_is_refused_with_its_line() -> None:
    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    for model in (Own(Clips(), nn.Linear(6, 6)), nn.ModuleDict({"a": Clips()})["a"]):
        with pytest.raises(Refused, match=r"test_trace_blocks.py:\d+: return x.clamp") as caught:
            trace(model, torch.randn(4, 6), 4)
        assert "nn.Sequential of blocks" in str(caught.value.hint)


def test_values_between_children_are_tensors() -> None:
    class Number(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, float]:
            return x, float(x.sum())

    class Scale(nn.Module):
        def forward(self, pair: tuple[Tensor, float]) -> Tensor:
            return pair[0] * pair[1]

    with pytest.raises(Refused, match="block 1 of the model gives a tuple"):
        trace(nn.Sequential(nn.Linear(6, 6), Number(), Scale()), torch.randn(4, 6), 4)


def test_a_child_that_gives_more_than_it_did_is_an_error() -> None:
    class Sometimes(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x, x) if bool((x > 100).any()) else x

    model = nn.Sequential(nn.Identity(), Sometimes())
    traced = trace(model, torch.zeros(4, 6), 4)
    with pytest.raises(UserCodeError, match="gave 2 tensors, and 1 when it was tried"):
        run(traced, model, torch.full((4, 6), 101.0), [])
