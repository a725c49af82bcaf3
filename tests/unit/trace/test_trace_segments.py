"""A traced model, cut anywhere, computes what the module does: outputs and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from shoal.errors import Refused
from shoal.trace import Traced, trace
from zoo import SUBJECTS, Subject

# What a trace refuses, and what draws or changes its inputs, is looked at below.
LEFT_OUT = {
    "branches-on-inputs",
    "straight-through",
    "translator",
    "changes-input",
    "noise",
    "gumbel",
    "several-draws",
    "branches-on-weights",
}
TRACED = [
    name
    for name, subject in SUBJECTS.items()
    if name not in LEFT_OUT and not name.startswith("resnet101")
]


def double(value: Any) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, value)


def first_rows(value: Any, rows: int) -> Any:
    return tree_map(lambda leaf: leaf[:rows] if isinstance(leaf, Tensor) else leaf, value)


def tensors(outputs: Any) -> list[Tensor]:
    if hasattr(outputs, "__dataclass_fields__") and not isinstance(outputs, dict):
        outputs = [getattr(outputs, name) for name in outputs.__dataclass_fields__]
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def prepared(subject: Subject) -> tuple[nn.Module, Any, int]:
    torch.manual_seed(0)
    model = subject.model_fn().double().eval()
    inputs = double(subject.batch_fn(0)[0])
    return model, inputs, len(tree_leaves(inputs)[0])


def run_cut(traced: Traced, model: nn.Module, inputs: Any, pieces: int) -> Any:
    """The model's outputs, computed segment by segment over what lives at each cut."""
    count, forbidden = len(traced.ops), traced.forbidden
    allowed = [boundary for boundary in range(1, count) if boundary not in forbidden]
    cuts = sorted(
        {allowed[len(allowed) * k // pieces] for k in range(1, pieces)} if allowed else ()
    )
    known = dict(zip(traced.inputs, traced.flatten(inputs), strict=True))
    known |= dict(model.named_parameters()) | dict(model.named_buffers())
    alive: dict[str, Tensor] = {}
    segments = traced.segment(cuts)
    for segment in segments:
        assert set(segment.live_in) == set(alive)
        made = segment.callable()(known | alive)
        alive = {name: made[name] for name in segment.live_out}
    return traced.rebuild([made[name] for name in segments[-1].outputs])


@pytest.mark.parametrize("name", TRACED)
def test_segments_compute_what_the_module_does(name: str) -> None:
    model, inputs, rows = prepared(SUBJECTS[name])
    traced = trace(model, inputs, rows)
    trained = [p for p in model.parameters() if p.requires_grad]
    for number in {rows, 1} if traced.static_rows is None else {rows}:
        given = first_rows(inputs, number)
        expected = tensors(model(*given) if isinstance(given, tuple) else model(given))
        found = tensors(run_cut(traced, model, given, 4))
        assert len(expected) == len(found)
        gradients = []
        for outputs in (expected, found):
            floating = [each for each in outputs if each.requires_grad]
            loss = sum((each.square().sum() for each in floating), torch.zeros(()).double())
            if loss.requires_grad:
                gradients.append(torch.autograd.grad(loss, trained, allow_unused=True))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(*gradients, strict=True) if gradients else ():
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["branches-on-inputs", "branches-on-weights", "straight-through"])
def test_what_cannot_be_traced_is_refused_by_its_line(name: str, capfd: Any) -> None:
    model, inputs, rows = prepared(SUBJECTS[name])
    with pytest.raises(Refused, match=r"cannot be traced at .*awkward.py:|Rounded") as refused:
        trace(model, inputs, rows)
    assert "dpN" in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_tracing_changes_nothing_of_a_model_in_training() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traced = trace(model, torch.randn(4, 1, 6, 6).double(), 4)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    kinds = [node.name for node in traced.ops]
    assert any("dropout" in kind for kind in kinds)
    assert any("batch_norm" in kind for kind in kinds)
    assert [node.meta["path"] for node in traced.ops if "conv" in node.name] == ["0"]


def test_costs_and_crossing_bytes_are_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    traced = trace(model, torch.randn(4, 8), 4)
    names = [node.name for node in traced.ops]
    assert len(names) == 3
    # 2 · 4 · 8 · 32 FLOPs beside 2 · 4 · 32 · 2.
    assert traced.costs[names[0]] > traced.costs[names[2]] > 0
    assert traced.crossing() == [0, 4 * 32, 4 * 32, 4 * 2]


def test_tied_parameters_have_one_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Any:
            return self.head(self.embed(tokens))

    traced = trace(Tied(), torch.randint(7, (3, 5)), 3)
    assert set(traced.state.values()) == {"embed.weight"}
