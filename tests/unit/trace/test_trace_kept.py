"""What a trace keeps of a model's side effects and structures, and what it refuses to lose."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import Refused
from shoal.trace import Traced, trace


class Model(nn.Module):
    """Two layers and a buffer; `body` is the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.calls = 0
        self.double()


class InPlace(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h[:, 0].add_(1)
        z = self.b(h * 2).mul_(2.5)
        z.view(-1, 2, 2).mul_(2)
        z += h
        with torch.no_grad():
            self.mean.mul_(0.9).add_(z.mean(0) * 0.1)
        kept = torch.zeros_like(z)
        kept[:, 0] = z[:, 0]
        return z + kept.masked_fill_(z > 0, 1.5) + self.mean


class Assigns(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.mean = self.mean * 0.9 + h.detach().mean(0) * 0.1
        return self.b(h) * self.mean


class Regions(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with torch.autocast("cpu", enabled=False):
            total = h.sum(0, keepdim=True)
        with torch.no_grad():
            norm = h.norm(dim=1, keepdim=True)
        return F.dropout(self.b(h), 0.0, True) / norm + total


@dataclass(frozen=True, slots=True)
class Answer:
    logits: Any
    parts: Any
    name: str = "answer"


class Structured(Model):
    def forward(self, given: dict[str, Any]) -> Answer:
        h = self.a(given["x"]) * given["scale"]
        return Answer(self.b(h), {"hidden": (h, [None, h + 1]), "same": given["x"]})


def run(traced: Traced, model: nn.Module, inputs: Any, boundaries: list[int]) -> Any:
    known = dict(zip(traced.inputs, traced.flatten(inputs), strict=True))
    known |= dict(model.named_parameters()) | dict(model.named_buffers())
    alive: dict[str, Tensor] = {}
    segments = traced.segment(boundaries)
    for segment in segments:
        alive = segment.callable()(known | alive)
    return traced.rebuild([alive[name] for name in segments[-1].outputs])


@pytest.mark.parametrize("kind", [InPlace, Assigns, Regions])
@pytest.mark.parametrize("rows", [1, 5])
def test_every_cut_keeps_side_effects_and_gradients(kind: type[Model], rows: int) -> None:
    traced = trace(kind(), torch.randn(3, 4).double(), 3)
    assert traced.static_rows is None
    x = torch.randn(rows, 4).double()
    whole = kind()
    expected = whole(x)
    expected.square().sum().backward()
    cuts = [[b] for b in range(1, len(traced.ops)) if b not in traced.forbidden]
    assert cuts
    for boundaries in [[], *cuts]:
        model = kind()
        found = run(traced, model, x, boundaries)
        found.square().sum().backward()
        assert torch.equal(found, expected)
        assert torch.equal(model.mean, whole.mean)
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_a_view_that_is_written_to_forbids_cuts_and_a_plain_overwrite_does_not() -> None:
    plain = trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.randn(3, 4), 3)
    assert [node.target for node in plain.ops][1] is torch.ops.aten.relu.default
    assert plain.forbidden == set()
    assert trace(InPlace(), torch.randn(3, 4).double(), 3).forbidden


def test_structures_need_no_registration() -> None:
    model = Structured()
    x = torch.randn(3, 4).double()
    traced = trace(model, {"x": x, "scale": 2.0, "labels": None}, 3)
    given = {"x": x[:2], "scale": 2.0, "labels": None}
    found, expected = run(traced, model, given, [1]), model(given)
    assert type(found) is Answer
    assert found.name == "answer"
    assert torch.equal(found.logits, expected.logits)
    hidden, (nothing, more) = found.parts["hidden"]
    assert nothing is None
    assert torch.equal(hidden, expected.parts["hidden"][0])
    assert torch.equal(more, expected.parts["hidden"][1][1])
    assert found.parts["same"] is given["x"]


def test_a_condition_on_the_number_of_rows_makes_a_trace_for_this_number() -> None:
    class Pairs(Model):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return h.reshape(2, -1, 4).sum(1) if len(x) > 2 else h

    assert trace(Pairs(), torch.randn(4, 4).double(), 4).static_rows == 4


class Counts(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.b(self.a(x)) * self.calls


class Reshapes(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.mean = h.detach().sum()
        return self.b(h) + self.mean


class Item(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h * h.mean().item()


class Branch(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return torch.cond(h.sum() > 0, lambda h: h * 2, lambda h: h - 1, (h,))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Counts, "changes the number calls"),
        (Reshapes, r"buffer mean another shape .* \(4,\)"),
        (Item, r"test_trace_kept.py:\d+: return h \* h.mean\(\).item\(\)"),
        (Branch, "the model uses"),
    ],
)
def test_what_a_graph_would_lose_is_refused(kind: type[Model], says: str) -> None:
    with pytest.raises(Refused, match=says) as refused:
        trace(kind(), torch.randn(3, 4).double(), 3)
    assert "dpN/zeroK" in str(refused.value)
    assert kind().calls == 0


def test_an_operator_registered_with_its_gradient_is_kept() -> None:
    @torch.library.custom_op("shoal_test::triple", mutates_args=())
    def triple(x: Tensor) -> Tensor:
        return x * 3

    triple.register_fake(torch.empty_like)
    triple.register_autograd(lambda ctx, gradient: gradient * 3)

    class Triples(Model):
        def forward(self, x: Tensor) -> Tensor:
            return triple(self.a(x))

    model, x = Triples(), torch.randn(3, 4).double()
    (expected,) = torch.autograd.grad(model(x).sum(), [model.a.weight])
    found = run(trace(model, x, 3), model, x, [1])
    assert torch.equal(torch.autograd.grad(found.sum(), [model.a.weight])[0], expected)


class CountsRows(Model):
    def forward(self, x: Tensor) -> Tensor:
        first = self.mean.expand(len(x), -1)  # makes a plain number of the number of rows
        return F.dropout(torch.cat([first, self.a(x)], 1), 0.5)


def test_shapes_of_a_trace_for_some_rows_only_are_all_plain_numbers() -> None:
    traced = trace(CountsRows(), torch.randn(5, 4, dtype=torch.float64), 5)
    assert traced.static_rows == 5
    shapes = [node.meta["val"].shape for node in traced.graph.nodes if node.op != "output"]
    # A symbol before len(x) and none behind it would read as a dropout of something without rows.
    assert all(type(size) is int for shape in shapes for size in shape)


class Unviewable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(x.t())


def test_what_torch_logs_of_a_failed_trace_is_not_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(Refused, match="Tensor must have a last dimension with stride 1"):
        trace(Unviewable(), torch.randn(2, 5), 2)
    assert not [each for each in caplog.records if each.levelname == "ERROR"]
