"""Functional dropout has the masks of layers, in eager modules and in traced graphs alike."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from shoal.errors import Refused
from shoal.parallel.randomness import (
    StepKey,
    counted,
    intercepting,
    use_counted_dropout,
    use_counted_randomness,
)

ROWS = torch.arange(12)
pytestmark = pytest.mark.filterwarnings("ignore:dropout2d. Received a 3D input")


class Each(nn.Module):
    """Applies a function twice, the second time in a module of its own."""

    def __init__(self, function: Callable[[Tensor], Tensor], inner: bool = True) -> None:
        super().__init__()
        self.function = function
        self.inner = Each(function, inner=False) if inner else None

    def forward(self, x: Tensor) -> Tensor:
        once = self.function(x)
        return once if self.inner is None else self.inner(once + 1.0)


def attention(**options: Any) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, -1)).transpose(1, 2)
        k = q[:, :2] if options.get("enable_gqa") else q
        mask = options.get("attn_mask")
        told = options | ({"attn_mask": mask(x)} if mask is not None else {})
        return (
            F.scaled_dot_product_attention(q, k, k, dropout_p=0.3, **told)
            .transpose(1, 2)
            .flatten(2)
        )

    return run


def bool_mask(x: Tensor) -> Tensor:
    return torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)


def float_mask(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 36, dtype=x.dtype).view(6, 6)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.4),
    "in place": lambda x: F.dropout(x * 1.0, 0.4, True, True),
    "torch": lambda x: torch.dropout(x, 0.4, True),
    "aten": lambda x: torch.ops.aten.dropout(x, 0.4, True),
    "rows merged": lambda x: F.dropout(x.flatten(0, 1), 0.4).unflatten(0, (-1, 6)),
    "rows second": lambda x: F.dropout(x[:, :5].transpose(0, 1), 0.4).transpose(0, 1),
    "no rows": lambda x: x + F.dropout(torch.ones_like(x[:1]), 0.4),
    "1d": lambda x: F.dropout1d(x, 0.4),
    "2d": lambda x: F.dropout2d(x[..., None], 0.4)[..., 0],
    "3d": lambda x: F.dropout3d(x[..., None, None], 0.4)[..., 0, 0],
    "alpha": lambda x: F.alpha_dropout(x, 0.4, True),
    "feature alpha": lambda x: F.feature_alpha_dropout(x, 0.4, True),
    "attention": attention(),
    "causal attention": attention(is_causal=True, scale=0.3),
    "grouped attention": attention(enable_gqa=True),
    "masked attention": attention(attn_mask=bool_mask),
    "biased attention": attention(attn_mask=float_mask),
}


def ready(model: nn.Module, rows: Tensor = ROWS, step: int = 3) -> StepKey:
    key = StepKey(5)
    use_counted_dropout(model, key)
    key.begin(step, rows, 0)
    return key


def run(model: nn.Module, inputs: Tensor, rows: Tensor = ROWS) -> Tensor:
    key = ready(model, rows)
    with counted(key, model):
        return model(inputs)


def traced(model: nn.Module, inputs: Tensor) -> Any:
    batch = torch.export.Dim("batch", min=2)
    shapes = tuple({0: batch} for _ in model.forward.__code__.co_varnames[1:2])
    return torch.export.export(model, (inputs,), dynamic_shapes=shapes, strict=False)


def run_graph(model: nn.Module, inputs: Tensor, rows: Tensor = ROWS) -> Tensor:
    program, key = traced(model, torch.cat((inputs, inputs))), StepKey(5)
    key.know(model)
    use_counted_randomness(program.graph_module, key)
    key.begin(3, rows, 0)
    state = [*program.state_dict.values(), *program.constants.values()]
    return torch.fx.Interpreter(program.graph_module).run(*state, inputs)[0]


def inputs(width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 6, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_rows_anywhere_drop_the_same_elements(name: str) -> None:
    whole, x = run(Each(FUNCTIONS[name]), inputs()), inputs()
    assert not torch.equal(whole, run(Each(FUNCTIONS[name]).eval(), x))
    for start, stop in ((0, 7), (8, 12), (2, 4)):
        rows = ROWS[start:stop]
        part = run(Each(FUNCTIONS[name]), x[start:stop], rows)
        torch.testing.assert_close(part, whole[start:stop], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_graph_drops_what_eager_modules_do(name: str) -> None:
    x = inputs()
    assert torch.equal(run_graph(Each(FUNCTIONS[name]), x), run(Each(FUNCTIONS[name]), x))
    part = run_graph(Each(FUNCTIONS[name]), x[3:6], ROWS[3:6])
    assert torch.equal(part, run(Each(FUNCTIONS[name]), x[3:6], ROWS[3:6]))


LAYERS = {
    "dropout": nn.Dropout,
    "1d": nn.Dropout1d,
    "alpha": nn.AlphaDropout,
    "feature alpha": nn.FeatureAlphaDropout,
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_drops_what_its_function_does(name: str) -> None:
    model, x = nn.Sequential(nn.Identity(), LAYERS[name](0.4)), inputs()
    plain = run_graph(model, x)
    function = Each(FUNCTIONS[name], inner=False)
    assert torch.equal(plain, run(nn.Sequential(nn.Identity(), function), x))
    assert torch.equal(plain, run(model, x))
    # A layer that has its masks by a key by now is traced as what it was.
    assert torch.equal(plain, run_graph(model, x))


def test_one_dimensional_dropout_without_rows_is_torchs() -> None:
    """An input [channels, length]: whole rows of it drop."""
    mask = run(nn.Sequential(nn.Dropout1d(0.5)), torch.ones(12, 50)) != 0
    assert torch.equal(mask.any(1), mask.all(1))
    assert 0 < int(mask.any(1).sum()) < 12


@pytest.mark.parametrize("name", ["alpha", "feature alpha"])
def test_alpha_dropout_keeps_mean_and_variance_like_torchs(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    function, x = FUNCTIONS[name], torch.randn(12, 4000, 10, generator=generator)
    ours, theirs = run(Each(function, inner=False), x), function(x)
    assert abs(float(ours.mean()) - float(theirs.mean())) < 0.02
    assert abs(float(ours.var()) - float(theirs.var())) < 0.05
    if name == "alpha":
        values = run(Each(function, inner=False), torch.zeros(12, 40)).unique()
        torch.testing.assert_close(values, function(torch.zeros(12, 40)).unique())


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.2}, {"attn_mask": True}, {"attn_mask": False}],
)
def test_attention_in_parts_is_the_fused_one(kind: torch.dtype, options: Any) -> None:
    """At a tiny chance of dropping, which hits nothing here."""
    q, k, v = (torch.randn(12, 2, 6, 8, dtype=kind).requires_grad_() for _ in range(3))
    if "attn_mask" in options:
        # The second query may look nowhere: zeros, and a gradient that is no NaN.
        mask = torch.ones(6, 6, dtype=torch.bool).tril().index_fill(0, torch.tensor(1), False)
        as_float = torch.zeros(6, 6, dtype=kind).masked_fill(~mask, -math.inf)
        options = {"attn_mask": mask if options["attn_mask"] else as_float}
    results = []
    for chance in (1e-9, 0.0):
        model = Each(
            lambda x, p=chance: F.scaled_dot_product_attention(x, k, v, dropout_p=p, **options),
            inner=False,
        )
        output = run(model, q)
        results.append((output, *torch.autograd.grad(output.square().sum(), (q, k, v))))
    limit = 1e-8 if kind == torch.float64 else 0.1
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)


@pytest.mark.parametrize("way", [run, run_graph])
def test_attention_follows_autocast(way: Any) -> None:
    x = inputs().float()
    model = Each(attention(is_causal=True), inner=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert way(model, x).dtype == torch.bfloat16
        assert run(model.eval(), x).dtype == torch.bfloat16


def test_attention_in_a_multi_head_attention_and_an_encoder_layer() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        return layer.double()

    whole = run(build(), inputs())
    assert not torch.equal(whole, run(build(), inputs() + 0.0, ROWS + 1))
    assert torch.equal(run_graph(build(), inputs()), whole)
    part = run(build(), inputs()[4:9], ROWS[4:9])
    torch.testing.assert_close(part, whole[4:9], rtol=1e-12, atol=1e-12)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.attention(x, x, x), -1)


def test_the_weights_of_multi_head_attention() -> None:
    whole = run(Weights(), inputs())
    assert bool((whole == 0).any())
    torch.testing.assert_close(run(Weights(), inputs()[4:9], ROWS[4:9]), whole[4:9])
    assert torch.equal(run_graph(Weights(), inputs()), whole)


class Mixed(nn.Module):
    """A layer, and functions of two kinds, some of which drop nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.dropout(x, 0.0), 0.3, training=False)
        masks = [F.dropout(x, 0.5), self.drop(x), F.dropout(x, 0.5), F.dropout1d(x, 0.5)]
        return torch.stack(masks)


def test_no_two_calls_have_the_same_mask() -> None:
    x = torch.ones(12, 6, 40)
    masks = run(Mixed(), x)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 4
    assert torch.equal(run_graph(Mixed(), x), masks)


class Shared(nn.Module):
    """Layers and functions under two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Dropout(0.3), Each(FUNCTIONS["dropout"]))
        self.b, self.c = self.a, nn.ModuleList([self.a[0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.c[0](self.b(self.a(x) + 1) + 1)


def test_a_module_with_two_names_goes_by_the_first() -> None:
    assert torch.equal(run_graph(Shared(), inputs()), run(Shared(), inputs()))


def test_a_model_without_functional_dropout_is_left_alone_after_a_pass() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1))
    key = ready(model)
    assert key.intercepts is None
    with counted(key, model):
        model(inputs().float())
    assert key.intercepts is False
    with counted(key, model):
        assert not torch.overrides._is_torch_function_mode_enabled()
    # One that turns to it later is found out.
    with counted(key, model):
        F.dropout(inputs(), 0.5)
    assert key.intercepts


class Checkpointed(nn.Module):
    """Runs a part of itself again in the backward pass."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.inner = Each(FUNCTIONS["dropout"], inner=False)
        self.layer = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        parts = {
            "module": lambda x: self.inner(x.exp()).square(),
            "layer": lambda x: self.layer(x.exp()).square(),
            "function": lambda x: F.dropout(x.exp(), 0.5).square(),
            "twice": lambda x: self.inner(self.inner(x.exp())).square(),
        }
        if not self.training:
            return parts[self.part](x)
        return checkpoint(parts[self.part], x, use_reentrant=False)


@pytest.mark.parametrize("part", ["module", "layer"])
def test_a_checkpoint_of_the_models_own_repeats_its_masks(part: str) -> None:
    x = inputs().requires_grad_()
    key = ready(model := Checkpointed(part))
    with counted(key, model):
        output = model(x)
    with intercepting(key):
        output.sum().backward()
    # The derivative of a kept (2 eˣ)² is twice itself, and of a dropped one 0.
    torch.testing.assert_close(x.grad, 2 * output.detach())


@pytest.mark.parametrize("part", ["function", "twice"])
def test_a_checkpoint_whose_calls_cannot_be_told_apart_is_refused(part: str) -> None:
    key = ready(model := Checkpointed(part))
    with counted(key, model):
        output = model(inputs().requires_grad_())
    with intercepting(key), pytest.raises(Refused, match=r"recompute"):
        output.sum().backward()


class Noise(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "rand_like": torch.rand_like,
    "randn_like": lambda x: x + torch.randn_like(x),
    "randn": lambda x: x + torch.randn(8, dtype=x.dtype),
    "randint": lambda x: x + torch.randint(3, (8,)),
    "randperm": lambda x: x[:, :, torch.randperm(8)],
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "normal": lambda x: torch.normal(x, 1.0),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "multinomial": lambda x: torch.multinomial(x.sigmoid().flatten(1), 2),
    "exponential": lambda x: F.gumbel_softmax(x),
    "poisson": lambda x: torch.poisson(x.exp()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_random_operations_in_a_graph_are_refused_by_name_and_line(name: str) -> None:
    program = traced(nn.Sequential(Noise(REFUSED[name])), inputs())
    with pytest.raises(Refused, match=rf"{name}.*in 0 .*test_parallel_randomness_functional"):
        use_counted_randomness(program.graph_module, StepKey(0))


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize(("dropout", "layers"), [(0.0, 2), (0.5, 2)])
def test_dropout_within_a_recurrent_layer_is_refused(dropout: float, layers: int) -> None:
    model = nn.GRU(8, 8, layers, dropout=dropout, batch_first=True).double()
    program = traced(model, inputs())
    if not dropout:
        assert use_counted_randomness(program.graph_module, StepKey(0)) == 0
        return
    with pytest.raises(Refused, match=r"gru.*draws") as caught:
        use_counted_randomness(program.graph_module, StepKey(0))
    assert "nn.Dropout between" in str(caught.value)


def test_random_operations_told_not_to_draw_stay() -> None:
    program = traced(Noise(lambda x: F.rrelu(F.dropout(x, 0.5, False), training=False)), inputs())
    assert use_counted_randomness(program.graph_module, StepKey(0)) == 0


def test_a_graph_with_counted_nodes_becomes_code_and_a_copy() -> None:
    program, key = traced(Each(FUNCTIONS["dropout"]), inputs()), StepKey(5)
    assert use_counted_randomness(program, key) == 2
    module = torch.fx.GraphModule(program.graph_module, program.graph)
    key.begin(3, ROWS, 0)
    (again,) = module(inputs())
    assert torch.equal(again, run(Each(FUNCTIONS["dropout"]), inputs()))


def test_nodes_of_a_cut_value_drop_their_part_of_it() -> None:
    """Four heads of which two are here; and half of a dropout's width."""
    x = inputs()
    q = x.unflatten(-1, (4, -1)).transpose(1, 2)
    heads = Each(lambda q: F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), inner=False)
    width = Each(FUNCTIONS["dropout"], inner=False)
    for model, whole, dim in ((heads, q, 1), (width, x, 2)):
        expected = run(model, whole)
        size = whole.shape[dim]
        piece = whole.narrow(dim, size // 2, size // 2)
        program, key = traced(model, piece), StepKey(5)
        for node in program.graph.nodes:
            node.meta["cut"] = (dim, size // 2, size)
        assert use_counted_randomness(program, key) == 1
        key.begin(3, ROWS, 0)
        (found,) = torch.fx.GraphModule(program.graph_module, program.graph)(piece)
        assert torch.equal(found, expected.narrow(dim, size // 2, size // 2))
