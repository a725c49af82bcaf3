import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

from shoal.checkpoint import Alone, Checkpoint, Piece, Snapshot, save
from shoal.checkpoint.optimizer_state import flatten, restore
from shoal.errors import RunError

Make = Callable[[nn.Module], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda m: torch.optim.SGD(groups(m), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(groups(m), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda m: torch.optim.Adam(groups(m), lr=1e-3, betas=(0.8, 0.99)),
    "amsgrad": lambda m: torch.optim.Adam(groups(m), lr=torch.tensor(1e-3), amsgrad=True),
    "adamw fused": lambda m: torch.optim.AdamW(groups(m), lr=1e-3, fused=True),
    "nadam": lambda m: torch.optim.NAdam(groups(m)),
    "rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
}


def groups(module: nn.Module) -> list[dict[str, Any]]:
    weights = [p for p in module.parameters() if p.dim() > 1]
    others = [p for p in module.parameters() if p.dim() == 1]
    return [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def build(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(5)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(4))
    module(torch.zeros(1, 3, 6, 6))
    return module.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train(module: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], torch.Tensor):
                group["lr"] = 0.01 / (step + 1)
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 3, 6, 6, generator=generator).to(next(module.parameters()))
        optimizer.zero_grad()
        module(inputs).square().mean().backward()
        optimizer.step()


def names_of(module: nn.Module) -> dict[Parameter, str]:
    return {parameter: name for name, parameter in module.named_parameters()}


def through_a_file(
    folder: Path, module: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, scalars = flatten(optimizer, names_of(module))
    everything = {**{name: p.detach() for name, p in module.named_parameters()}, **tensors}
    snapshot = Snapshot(
        step=3,
        tensors={name: Piece.whole(tensor) for name, tensor in everything.items()},
        fingerprint="f",
        strategy="single",
        position=3,
        optimizer=scalars,
    )
    read = Checkpoint.open(save(folder, snapshot, Alone()).path)
    assert read.weights == tuple(name for name, _ in module.named_parameters())
    return {name: read.read(name) for name in read.names}, read.manifest.optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_going_on_from_a_file_gives_the_same_bits(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    whole = build(dtype)
    undisturbed = OPTIMIZERS[kind](whole)
    train(whole, undisturbed, 0, 3)
    tensors, scalars = through_a_file(tmp_path, whole, undisturbed)
    train(whole, undisturbed, 3, 6)

    resumed = build(dtype)
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            parameter.copy_(tensors[name])
    optimizer = OPTIMIZERS[kind](resumed)
    for group in optimizer.param_groups:
        group["maximize"] = True  # restored to what was saved
    restore(optimizer, names_of(resumed), tensors, scalars)
    train(resumed, optimizer, 3, 6)

    for mine, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    ours, expected = optimizer.state_dict(), undisturbed.state_dict()
    assert ours["param_groups"] == expected["param_groups"]
    assert ours["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        assert ours["state"][index].keys() == values.keys()
        for key, value in values.items():
            mine = ours["state"][index][key]
            assert type(mine) is type(value)
            assert (mine is None and value is None) or torch.equal(
                torch.as_tensor(mine), torch.as_tensor(value)
            )
            if isinstance(value, torch.Tensor):
                assert (mine.dtype, mine.stride()) == (value.dtype, value.stride())


def test_the_scalars_are_json_and_name_the_groups() -> None:
    module = build(torch.float32)
    optimizer = OPTIMIZERS["adamw fused"](module)
    train(module, optimizer, 0, 1)
    tensors, scalars = flatten(optimizer, names_of(module))
    assert sorted(tensors)[:3] == ["0.bias/exp_avg", "0.bias/exp_avg_sq", "0.bias/step"]
    assert json.loads(json.dumps(scalars, allow_nan=False)) == scalars
    assert scalars["groups"][0]["names"] == ["0.weight", "2.weight"]
    assert scalars["groups"][0]["options"]["weight_decay"] == 0.1
    assert "fused" not in scalars["groups"][0]["options"]


def test_a_part_of_the_parameters_can_be_restored() -> None:
    """As a pipeline's last stage does: one group of it is empty, and has its own options."""
    module = build(torch.float32)
    optimizer = OPTIMIZERS["adam"](module)
    train(module, optimizer, 0, 2)
    tensors, scalars = flatten(optimizer, names_of(module))
    stage = nn.Linear(*reversed(module[2].weight.shape), bias=False)
    part = torch.optim.Adam([{"params": [stage.weight]}, {"params": []}], lr=9)
    restore(part, {stage.weight: "2.weight"}, tensors, scalars)
    assert torch.equal(part.state[stage.weight]["exp_avg"], tensors["2.weight/exp_avg"])
    assert [group["weight_decay"] for group in part.param_groups] == [0.1, 0.0]
    assert [group["betas"] for group in part.param_groups] == [(0.8, 0.99)] * 2


class Odd(Optimizer):
    """Its state is whatever the test wants it to be."""

    def __init__(self, module: nn.Module, key: Any, value: Any, **defaults: Any) -> None:
        super().__init__(module.parameters(), defaults)
        for parameter in module.parameters():
            self.state[parameter][key] = value

    def step(self, closure: Any = None) -> None:
        raise NotImplementedError


def test_numbers_of_every_kind_come_back() -> None:
    module = nn.Linear(2, 1, bias=False)
    for value in (3, 2**60, 0.1, True, None, float("inf"), float("-inf")):
        optimizer = Odd(module, "count", value, limit=float("inf"), shape=(1, 2.5), name="x")
        _, scalars = flatten(optimizer, names_of(module))
        other = Odd(module, "count", 0, limit=0.0, shape=(0, 0), name="y")
        restore(other, names_of(module), {}, json.loads(json.dumps(scalars, allow_nan=False)))
        found = other.state[module.weight]["count"]
        assert (found, type(found)) == (value, type(value))
        group = other.param_groups[0]
        assert (group["limit"], group["shape"], group["name"]) == (float("inf"), (1, 2.5), "x")


@pytest.mark.parametrize(
    ("key", "value", "options", "message"),
    [
        ("history", [torch.ones(1)], {}, "state 'history' of weight is a list"),
        ("a/b", torch.ones(1), {}, "state 'a/b' of weight has no plain name"),
        (3, torch.ones(1), {}, "state 3 of weight has no plain name"),
        ("count", 1, {"hook": print}, "option 'hook' is a builtin_function_or_method"),
    ],
)
def test_what_cannot_be_saved_is_named(key: Any, value: Any, options: Any, message: str) -> None:
    module = nn.Linear(2, 1, bias=False)
    with pytest.raises(RunError, match=f"optimizer Odd cannot be saved: {message}"):
        flatten(Odd(module, key, value, **options), names_of(module))


def test_state_may_not_have_a_parameters_name() -> None:
    module = nn.Linear(2, 1)
    names = {module.weight: "a", module.bias: "a/b"}
    with pytest.raises(RunError, match="state a/b has the name of a parameter"):
        flatten(Odd(module, "b", torch.ones(1)), names)


def test_state_of_another_model_is_refused() -> None:
    module = nn.Linear(2, 1)
    _, scalars = flatten(torch.optim.SGD(module.parameters(), lr=1), names_of(module))
    other = nn.ModuleDict({"fc": nn.Linear(2, 1)})
    with pytest.raises(RunError, match=r"no optimizer state for fc\.bias"):
        restore(torch.optim.SGD(other.parameters(), lr=1), names_of(other), {}, scalars)
    split = torch.optim.SGD([{"params": [p]} for p in module.parameters()], lr=1)
    _, split_scalars = flatten(split, names_of(module))
    joined = torch.optim.SGD(module.parameters(), lr=1)
    with pytest.raises(RunError, match="groups of parameters are not those"):
        restore(joined, names_of(module), {}, split_scalars)
    with pytest.raises(ValueError, match="has no name"):
        flatten(joined, {})
