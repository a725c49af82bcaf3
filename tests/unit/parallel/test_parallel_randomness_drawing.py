"""Noise that does not depend on the split; what is not counted is refused by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shoal.errors import Refused
from shoal.parallel.randomness import StepKey, counted

Draw = Callable[[Tensor], Tensor]
ROWS = 12


class Drawing(nn.Module):
    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.draw(x)


def drawn(
    draw: Draw, rows: range, *, splits: bool = False, width: int = 7, step: int = 3
) -> Tensor:
    key = StepKey(seed=5, splits=splits)
    model = Drawing(draw)
    key.know(model)
    key.begin(step, torch.tensor(rows), rank=rows.start)
    with counted(key, model):
        return model(torch.zeros(len(rows), width))


DRAWS: dict[str, Draw] = {
    "rand": lambda x: torch.rand(x.shape),
    "rand, sizes": lambda x: torch.rand(len(x), 1, 3),
    "randn": lambda x: torch.randn(*x.shape, dtype=torch.float64),
    "randn_like": torch.randn_like,
    "rand_like": lambda x: torch.rand_like(x, dtype=torch.float64),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-2, 5),
    "normal_": lambda x: torch.empty_like(x).normal_(std=3.0),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.3)),
    "bernoulli of p": lambda x: torch.bernoulli(x, 0.3),
    "bernoulli_": lambda x: x.new_empty(len(x), 1).bernoulli_(0.8),
    "twice": lambda x: torch.randn_like(x) - torch.randn_like(x),
    "rows are second": lambda x: torch.rand(1, len(x), 2)[0],
    "two for each": lambda x: torch.rand(2 * len(x), 2).view(len(x), 4),
}


@pytest.mark.parametrize("name", DRAWS)
def test_rows_have_their_own_numbers_wherever_they_are(name: str) -> None:
    draw = DRAWS[name]
    whole = drawn(draw, range(ROWS))
    parts = [drawn(draw, range(*ends), splits=True) for ends in ((0, 5), (5, 6), (6, ROWS))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(drawn(draw, range(ROWS), step=4), whole)


def test_numbers_are_spread_as_torchs() -> None:
    uniform = drawn(lambda x: torch.rand_like(x, dtype=torch.float64), range(200), width=500)
    ordered = uniform.flatten().sort().values
    assert float(ordered[0]) >= 0
    assert float(ordered[-1]) < 1
    # Kolmogorov and Smirnov's distance; its 0.1 % point is 1.95 ÷ √n.
    expected = (torch.arange(len(ordered)) + 0.5) / len(ordered)
    assert float((ordered - expected).abs().max()) < 1.95 / math.sqrt(len(ordered))
    normal = drawn(lambda x: torch.randn_like(x, dtype=torch.float64), range(200), width=500)
    shares = 0.5 * (1 + torch.erf(normal.flatten().sort().values / math.sqrt(2)))
    assert float((shares - expected).abs().max()) < 1.95 / math.sqrt(len(ordered))
    hits = drawn(lambda x: torch.bernoulli(x, 0.3), range(200), width=500)
    assert abs(float(hits.mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / hits.numel())


def test_options_of_the_call_are_kept() -> None:
    given = drawn(
        lambda x: torch.rand(len(x), 2, dtype=torch.float16, requires_grad=True), range(3)
    )
    assert given.dtype == torch.float16
    assert given.requires_grad
    scaled = drawn(lambda x: torch.empty(len(x), 400).uniform_(-2, 5), range(3))
    assert -2 <= float(scaled.min()) < -1.9
    assert 4.9 < float(scaled.max()) < 5


REFUSED: dict[str, tuple[Draw, str]] = {
    "gumbel_softmax": (F.gumbel_softmax, "gumbel_softmax"),
    "multinomial": (lambda x: torch.multinomial(x + 1, 1), "multinomial"),
    "randperm": (lambda x: x[torch.randperm(len(x))], "randperm"),
    "a generator": (lambda x: torch.rand(x.shape, generator=torch.Generator()), "rand"),
    "one for all": (lambda x: x + torch.rand(1, 7), "rand"),
    "of no rows": (lambda x: x + torch.rand(7), "rand"),
    "LSTM": (lambda x: nn.LSTM(7, 3, 2, dropout=0.5)(x[:, None])[0], "lstm"),
}


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_counted_is_refused_by_name_where_it_would_differ(name: str) -> None:
    draw, said = REFUSED[name]
    drawn(draw, range(4))  # all rows in one pass
    if name == "LSTM":
        made = nn.LSTM(7, 3, 2, dropout=0.5)

        def draw(x: Tensor) -> Tensor:
            result: Tensor = made(x[:, None])[0]
            return result

    with pytest.raises(Refused, match=rf"random numbers with {said} \(.*{__name__}\.py:\d+\)"):
        drawn(draw, range(4), splits=True)


def test_a_model_that_begins_to_draw_later_is_refused_too() -> None:
    key = StepKey(seed=5, splits=True)
    model: Any = Drawing(lambda x: x)
    key.know(model)
    for step in range(2):
        key.begin(step, torch.arange(4), 0)
        with counted(key, model):
            model(torch.zeros(4, 2))
    model.draw = F.gumbel_softmax
    with pytest.raises(Refused, match="one of torch's functions"), counted(key, model):
        model(torch.zeros(4, 2))


def test_a_model_in_evaluation_draws_as_it_likes() -> None:
    key = StepKey(seed=5, splits=True)
    model = Drawing(F.gumbel_softmax).eval()
    key.know(model)
    with counted(key, model):
        assert model(torch.zeros(4, 2)).shape == (4, 2)


def test_weights_drop_alike_everywhere() -> None:
    weight = nn.Parameter(torch.ones(8, 6))

    def draw(x: Tensor) -> Tensor:
        return F.dropout(weight, 0.5).sum(0).expand(len(x), 6)

    assert torch.equal(drawn(draw, range(4)), drawn(draw, range(4, 8), splits=True))
