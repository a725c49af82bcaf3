"""The transformer against a plain computation, its masks, and its key bias without a gradient."""

import math

import pytest
import torch

from shoal.errors import BadExample, UsageError
from shoal.models import Transformer, TransformerOptions
from shoal.models.transformer import Attention
from shoal.recipe import SIGNATURES


def tiny(**options) -> Transformer:
    torch.manual_seed(0)
    given = {"classes": 3, "length": 6, "width": 8, "heads": 2, "layers": 2} | options
    if "features" not in given:
        given.setdefault("vocab", 11)
    return Transformer(TransformerOptions(**given)).double()


def ids(rows: int, length: int = 6) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(1, 11, (rows, length))


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    attention, x = Attention(8, 2).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k, v = (
            project(x)[..., part] for project in (attention.query, attention.key, attention.value)
        )
        heads.append((q @ k.mT / math.sqrt(4)).softmax(-1) @ v)
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, -1)))


def test_the_key_bias_has_a_true_gradient_of_zero_and_nothing_else_has():
    model = tiny()
    model(ids(4)).square().sum().backward()
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max()
        assert (largest < 1e-15) == name.endswith("key.bias"), (name, largest)


def test_padding_changes_nothing():
    model = tiny(pad_id=0)
    tokens = ids(4, 4)
    padded = torch.cat([tokens, torch.zeros(4, 2, dtype=torch.int64)], 1)
    torch.testing.assert_close(model(padded), model(tokens))
    without = tiny()
    assert not torch.allclose(without(padded), without(tokens))


def test_a_row_of_padding_alone_is_finite():
    model = tiny(pad_id=0)
    tokens = ids(2)
    tokens[0] = 0
    outputs = model(tokens)
    outputs.sum().backward()
    assert outputs.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_positions_matter():
    model, tokens = tiny(), ids(2)
    assert not torch.allclose(model(tokens), model(tokens.flip(1)))


def test_vectors_and_rows_of_images():
    model = tiny(features=5)
    images = torch.randn(4, 1, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(model(images), model(images[:, 0]))
    colours = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    rows = torch.cat([colours[:, 0], colours[:, 1]], -1)
    wide = tiny(features=10)
    torch.testing.assert_close(wide(colours), wide(rows))


@pytest.mark.parametrize("options", [{}, {"pad_id": 0}, {"dropout": 0.5}])
def test_no_rows_give_gradients_of_zero(options):
    model = tiny(**options)
    outputs = model(ids(0))
    outputs.sum().backward()
    assert outputs.shape == (0, 3)
    assert all((parameter.grad == 0).all() for parameter in model.parameters())


def test_dropout_is_in_modules_alone():
    model, tokens = tiny(dropout=0.5), ids(2)
    assert not torch.equal(model(tokens), model(tokens))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert torch.equal(model(tokens), model(tokens))


def test_bf16_autocast_is_near_float32():
    model, tokens = tiny().float(), ids(3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(tokens)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.float(), model(tokens), rtol=0.05, atol=0.05)


def test_a_sequence_that_is_too_long_says_so():
    with pytest.raises(BadExample, match="7 positions; the model has 6"):
        tiny()(ids(2, 7))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "vocab is None and features is None"),
        ({"vocab": 5, "features": 5}, "vocab is 5 and features is 5"),
        ({"vocab": 5, "width": 10, "heads": 4}, "width 10 cannot be cut into 4 heads"),
        ({"features": 5, "pad_id": 0}, "pad_id needs token ids"),
    ],
)
def test_options_that_do_not_fit_are_named(options, said):
    with pytest.raises(UsageError, match=said):
        TransformerOptions(classes=2, length=4, **options)


def test_defaults_are_those_of_the_recipe():
    ours = TransformerOptions(classes=2, length=4, vocab=5)
    options = SIGNATURES["model"]["transformer"](classes=2, length=4, vocab=5).options()
    assert {name: getattr(ours, name) for name in options} == options
