"""Optimizers: which parameters are in which group, and updates against plain arithmetic."""

import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from shoal.errors import UsageError, UserCodeError
from shoal.learn import build_optimizer, clip_norm_of, parameter_groups
from shoal.recipe import SIGNATURES, Component


def optimizer(name: str, module: nn.Module, **options) -> torch.optim.Optimizer:
    return build_optimizer(SimpleNamespace(name=name, options=options), module)


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


class PreNormBlock(nn.Module):
    """Has Norm in its name, and a linear layer that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.batch = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.layer = nn.LayerNorm(3)
        self.rms = nn.RMSNorm(3)
        self.own = OwnNorm()
        self.block = PreNormBlock()
        self.first = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def names(module: nn.Module, group: dict) -> set[str]:
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    found = [by_id[id(parameter)] for parameter in group["params"]]
    assert len(found) == len(set(found))
    return set(found)


NORMS = {"batch", "group", "instance", "layer"}
NORM_PARAMETERS = {f"{name}.{kind}" for name in NORMS for kind in ("weight", "bias")} | {
    "rms.weight",
    "own.gain",
}
BIASES = {f"{name}.bias" for name in NORMS} | {
    "conv.bias",
    "block.inner.bias",
    "first.bias",
    "tied.bias",
}
WEIGHTS = {"conv.weight", "block.inner.weight", "first.weight"}


@pytest.mark.parametrize(
    ("no_decay", "spared"),
    [
        (("bias",), BIASES),
        (("norm",), NORM_PARAMETERS),
        (("bias", "norm"), BIASES | NORM_PARAMETERS),
    ],
)
def test_groups_hold_every_trainable_parameter_once(no_decay, spared):
    module = Mixed()
    decaying, other = parameter_groups(module, no_decay)
    assert names(module, other) == spared
    assert names(module, decaying) == (WEIGHTS | BIASES | NORM_PARAMETERS) - spared
    assert other["weight_decay"] == 0.0
    assert "weight_decay" not in decaying


def test_one_group_where_all_decay_or_none_does():
    module = Mixed()
    (only,) = parameter_groups(module, ())
    assert names(module, only) == WEIGHTS | BIASES | NORM_PARAMETERS
    (spared,) = parameter_groups(nn.LayerNorm(3), ("norm",))
    assert spared["weight_decay"] == 0.0


def test_nothing_to_train_says_so():
    for module in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(UsageError, match="nothing to train"):
            optimizer("sgd", module, lr=0.1)


def train(module: nn.Module, steps: int, built: torch.optim.Optimizer) -> None:
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    for _ in range(steps):
        built.zero_grad()
        module(x).square().sum().backward()
        built.step()


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def gradients(weight, bias):
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    out = 2 * (x @ weight.T + bias)
    return out.T @ x, out.sum(0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_its_formula_and_spares_the_bias(nesterov):
    module = linear()
    values = [module.weight.detach().clone(), module.bias.detach().clone()]
    train(
        module,
        4,
        optimizer(
            "sgd",
            module,
            lr=0.05,
            momentum=0.9,
            nesterov=nesterov,
            weight_decay=0.1,
            no_decay=["bias"],
        ),
    )
    buffers = [torch.zeros_like(value) for value in values]
    for _ in range(4):
        grads = list(gradients(*values))
        grads[0] = grads[0] + 0.1 * values[0]
        buffers = [0.9 * buffer + grad for buffer, grad in zip(buffers, grads, strict=True)]
        moves = (
            [grad + 0.9 * buffer for grad, buffer in zip(grads, buffers, strict=True)]
            if nesterov
            else buffers
        )
        values = [value - 0.05 * move for value, move in zip(values, moves, strict=True)]
    torch.testing.assert_close(module.weight.detach(), values[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(module.bias.detach(), values[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_and_adamw_are_their_formulas(name):
    module = linear()
    values = [module.weight.detach().clone(), module.bias.detach().clone()]
    options = {"lr": 0.01, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}
    train(module, 3, optimizer(name, module, **options))
    first = [torch.zeros_like(value) for value in values]
    second = [torch.zeros_like(value) for value in values]
    for step in range(1, 4):
        for i, grad in enumerate(gradients(*values)):
            if name == "adam":
                grad = grad + 0.1 * values[i]
            first[i] = 0.8 * first[i] + 0.2 * grad
            second[i] = 0.95 * second[i] + 0.05 * grad**2
            mean, square = first[i] / (1 - 0.8**step), second[i] / (1 - 0.95**step)
            decay = 0.01 * 0.1 * values[i] if name == "adamw" else 0
            values[i] = values[i] - decay - 0.01 * mean / (square.sqrt() + 1e-6)
    torch.testing.assert_close(module.weight.detach(), values[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.bias.detach(), values[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_steps_are_fused_and_remember_their_first_rate(name, dtype):
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).to(dtype)
    built = optimizer(name, module, lr=0.1, no_decay=["norm"])
    assert [(group["fused"], group["initial_lr"]) for group in built.param_groups] == [
        (True, 0.1)
    ] * 2
    before = [parameter.detach().clone() for parameter in module.parameters()]
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    built.step()
    assert all((a > b).all() for a, b in zip(before, module.parameters(), strict=True))


def test_where_nothing_is_fused_lists_are_used():
    with torch.device("meta"):
        built = optimizer("adam", nn.Linear(3, 2))
    assert (built.defaults["fused"], built.defaults["foreach"]) == (None, True)


def test_every_signature_of_the_recipe_can_be_built():
    for name, signature in SIGNATURES["optimizer"].items():
        given = signature(lr=0.5, clip_norm=2, no_decay=["norm"])
        component = Component(name=name, options=given.options())
        built = build_optimizer(component, nn.Linear(2, 2))
        for key, value in component.options.items():
            if key not in ("clip_norm", "no_decay"):
                assert built.defaults[key] == value, key
        assert "clip_norm" not in built.defaults
        assert clip_norm_of(component) == 2.0
    assert clip_norm_of(SimpleNamespace(name="sgd", options={})) is None


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("sdg", {}, "did you mean sgd"),
        ("sgd", {"momentun": 0.9}, "momentun"),
        ("sgd", {"lr": -1.0}, "Invalid learning rate"),
        ("sgd", {"no_decay": ["norms"]}, "did you mean norm"),
    ],
)
def test_what_cannot_be_is_named(name, options, said):
    with pytest.raises(UsageError, match=said):
        optimizer(name, nn.Linear(2, 2), **options)


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_optimizers.py").write_text(
        textwrap.dedent(
            """
            import torch

            def slow(params, lr=0.5, weight_decay=0.25):
                return torch.optim.SGD(params, lr=lr, weight_decay=weight_decay)

            def wrong(params):
                return 3

            def broken(params):
                raise KeyError("lr")
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_optimizers", None)


@pytest.mark.usefixtures("own")
class TestUsersOptimizers:
    def test_it_gets_its_options_and_neither_of_ours(self):
        built = optimizer("own_optimizers:slow", nn.Linear(2, 2), lr=2.0, clip_norm=1.0)
        (group,) = built.param_groups
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (2.0, 2.0, 0.25)

    def test_it_gets_groups_if_some_are_not_to_decay(self):
        built = optimizer("own_optimizers.slow", nn.Linear(2, 2), no_decay=["bias"])
        assert [group["weight_decay"] for group in built.param_groups] == [0.25, 0.0]

    def test_a_class_of_torch_is_as_good(self):
        built = optimizer("torch.optim:RMSprop", nn.Linear(2, 2), alpha=0.5)
        assert isinstance(built, torch.optim.RMSprop)
        assert built.defaults["alpha"] == 0.5

    def test_what_is_wrong_is_named(self):
        with pytest.raises(UsageError, match="returned a int"):
            optimizer("own_optimizers:wrong", nn.Linear(2, 2))
        with pytest.raises(UserCodeError, match="raised KeyError"):
            optimizer("own_optimizers:broken", nn.Linear(2, 2))
        with pytest.raises(UsageError, match="unexpected keyword argument 'rate'"):
            optimizer("own_optimizers:slow", nn.Linear(2, 2), rate=1.0)
