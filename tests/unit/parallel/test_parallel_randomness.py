"""Counter-based masks: what they depend on, and that they look random."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from shoal.parallel.randomness import (
    CountedDropout,
    Cut,
    Place,
    StepKey,
    chosen,
    dropped,
    use_counted_dropout,
)


def dropout(layer: nn.Module, rows: Tensor, step: int = 0, seed: int = 0) -> nn.Module:
    """A model of one dropout layer, ready for `step`."""
    model, key = nn.Sequential(layer), StepKey(seed)
    use_counted_dropout(model, key)
    key.begin(step, rows, 0)
    return model


def kept(layer: nn.Module, rows: Tensor, *shape: int, **place: int) -> Tensor:
    return dropout(layer, rows, **place)(torch.ones(len(rows), *shape)) != 0


ALL = torch.arange(64)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate_and_scale(p: float) -> None:
    output = dropout(nn.Dropout(p), ALL)(torch.ones(64, 1000, dtype=torch.float64))
    share = float((output != 0).double().mean())
    assert abs(share - (1 - p)) < 5 * math.sqrt(p * (1 - p) / output.numel())
    assert set(output.unique().tolist()) <= {0.0, 1 / (1 - p)}


def test_any_rows_anywhere_get_the_same_masks() -> None:
    whole = kept(nn.Dropout(0.5), ALL, 7, 3)
    for start, stop in ((0, 64), (5, 6), (17, 50), (9, 9)):
        assert torch.equal(kept(nn.Dropout(0.5), ALL[start:stop], 7, 3), whole[start:stop])


def test_pieces_of_a_large_mask_are_those_of_the_whole() -> None:
    rows = torch.arange(9)
    whole = chosen(77, rows, 40_000, 0.3)  # more than is made at once
    for row in rows:
        assert torch.equal(chosen(77, row[None], 40_000, 0.3)[0], whole[row])


def test_whole_channels_drop() -> None:
    for layer, shape in ((nn.Dropout1d, (5,)), (nn.Dropout2d, (5, 4)), (nn.Dropout3d, (5, 4, 2))):
        mask = kept(layer(0.5), ALL, 32, *shape).flatten(2)
        assert torch.equal(mask.any(2), mask.all(2))
        assert 0.4 < float(mask.any(2).float().mean()) < 0.6


def test_several_rows_of_an_example_are_one_example() -> None:
    """Tokens flattened into the first dimension keep masks that do not depend on the split."""
    model = dropout(nn.Dropout(0.5), ALL[10:20])
    whole = dropout(nn.Dropout(0.5), ALL)(torch.ones(64 * 6, 8))
    assert torch.equal(model(torch.ones(10 * 6, 8)), whole.view(64, 6, 8)[10:20].flatten(0, 1))


def test_other_shapes_differ_between_ranks() -> None:
    masks = []
    for rank in range(2):
        model, key = nn.Sequential(nn.Dropout(0.5)), StepKey(0)
        use_counted_dropout(model, key)
        key.begin(0, ALL[:10], rank)
        masks.append(model(torch.ones(13, 50)))
    assert not torch.equal(*masks)


def correlation(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((left.flatten(), right.flatten())).double())[0, 1])


def test_no_correlation_between_neighbours() -> None:
    """Neighbouring rows, elements, steps, seeds, layers and calls; 5 standard deviations."""
    rows, width = torch.arange(400), 500
    limit = 5 / math.sqrt(400 * 499)
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    key = StepKey(0)
    use_counted_dropout(model, key)
    key.begin(0, rows, 0)
    ones = torch.ones(400, width)
    first, second, again = (model[index](ones) for index in (0, 1, 0))
    step = kept(nn.Dropout(0.5), rows, width, step=1)
    seed = kept(nn.Dropout(0.5), rows, width, seed=1)
    assert abs(correlation(first[1:], first[:-1])) < limit
    assert abs(correlation(first[:, 1:], first[:, :-1])) < limit
    for other in (second, again, step, seed):
        assert abs(correlation(first, other)) < limit
    # Pairs of neighbours are as likely as chance has it, along rows and along elements.
    bits = (first != 0).long()
    for pairs in (2 * bits[1:] + bits[:-1], 2 * bits[:, 1:] + bits[:, :-1]):
        shares = torch.bincount(pairs.flatten(), minlength=4) / pairs.numel()
        assert (shares - 0.25).abs().max() < limit


def test_shares_of_rows_and_columns_scatter_as_chance_has_it() -> None:
    mask = chosen(1234, torch.arange(1000), 1000, 0.5).double()
    for axis in (0, 1):
        deviations = (mask.mean(axis) - 0.5) * math.sqrt(1000) / 0.5
        assert 0.85 < float(deviations.square().mean()) < 1.15
        assert float(deviations.abs().max()) < 5


def test_bits_of_the_hash_change_with_each_bit_of_a_row() -> None:
    """Flipping one bit of a row's number flips half of its mask, whichever bit it is."""
    base = chosen(5, torch.tensor([12345]), 4000, 0.5)
    for bit in range(0, 40, 3):
        other = chosen(5, torch.tensor([12345 ^ (1 << bit)]), 4000, 0.5)
        assert 0.45 < float((base ^ other).double().mean()) < 0.55


def test_the_same_layer_again_in_a_step_and_the_step_again() -> None:
    model = dropout(nn.Dropout(0.5), ALL)
    ones = torch.ones(64, 20)
    first, second = model(ones), model(ones)
    assert not torch.equal(first, second)
    layer = model[0]
    assert isinstance(layer, CountedDropout)
    layer.key.begin(0, ALL, 0)  # a step that was thrown away and is done again
    assert torch.equal(model(ones), first)
    assert torch.equal(model(ones), second)


def test_evaluation_p_0_and_p_1() -> None:
    ones = torch.ones(64, 4)
    assert torch.equal(dropout(nn.Dropout(0.5), ALL).eval()(ones), ones)
    assert torch.equal(dropout(nn.Dropout(0.0), ALL)(ones), ones)
    assert not dropout(nn.Dropout(1.0), ALL)(ones).any()


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_is_the_mask(inplace: bool) -> None:
    input = torch.ones(64, 10, requires_grad=True)
    output = dropout(nn.Dropout(0.25, inplace=inplace), ALL)(input * 1.0)
    output.sum().backward()
    assert torch.equal(input.grad, output.detach())


def test_bf16_keeps_its_mean() -> None:
    output = dropout(nn.Dropout(0.1), ALL)(torch.ones(64, 10, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert set(output.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).bfloat16().item()}


class Held(nn.Module):
    """A layer under two names and in a plain list; one that the user has derived."""

    class Own(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            return input * 3

    class Renamed(nn.Dropout):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Dropout(0.5)
        self.second = self.first
        self.own, self.renamed = self.Own(0.5), self.Renamed(0.5)
        self.hidden = [self.first]


def test_layers_stay_what_they_are() -> None:
    model, calls = Held(), []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    assert use_counted_dropout(model, StepKey(0)) == 2
    assert model.first is model.second is model.hidden[0]
    assert isinstance(model.first, nn.Dropout)
    assert isinstance(model.first, CountedDropout)
    assert isinstance(model.renamed, CountedDropout)
    assert not isinstance(model.own, CountedDropout)
    model.first(torch.ones(2, 2))
    assert calls == [1]


def test_layers_of_a_name_differ() -> None:
    model = nn.ModuleDict({name: nn.Dropout(0.5) for name in "abc"})
    key = StepKey(0)
    use_counted_dropout(model, key)
    key.begin(3, ALL, 0)
    masks = [model[name](torch.ones(64, 50)) for name in "abc"]
    for left, right in itertools.combinations(masks, 2):
        assert not torch.equal(left, right)


SHAPES = {
    "elements": ((6, 8, 10), 2, 4, 6),
    "middle": ((6, 8, 10), 1, 3, 5),
    "rows merged, width cut": ((6 * 7, 8), 1, 2, 6),
    "no rows": ((1, 8, 10), 2, 4, 5),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_piece_of_a_tensor_drops_what_the_whole_does(name: str) -> None:
    shape, dim, start, length = SHAPES[name]
    key = StepKey(0)
    key.begin(0, ALL[10:16], 0)
    whole = dropped(key, "a#0", shape, 0.5, device=torch.device("cpu"))
    assert 0.3 < float(whole.double().mean()) < 0.7
    piece = [length if index == dim else size for index, size in enumerate(shape)]
    place = Place(cut=Cut(dim, start, shape[dim]))
    found = dropped(key, "a#0", piece, 0.5, device=torch.device("cpu"), place=place)
    assert torch.equal(found, whole.narrow(dim, start, length))


def test_a_piece_of_the_positions_of_each_row() -> None:
    """Heads merged with the rows, [rows · heads, length, length], and cut by heads."""
    key = StepKey(0)
    key.begin(0, ALL[:6], 0)
    whole = dropped(key, "a#0", (6 * 8, 5, 5), 0.5, device=torch.device("cpu"))
    place = Place(cut=Cut(0, 2, 8))
    found = dropped(key, "a#0", (6 * 3, 5, 5), 0.5, device=torch.device("cpu"), place=place)
    assert torch.equal(found, whole.view(6, 8, 5, 5)[:, 2:5].flatten(0, 1))


def test_rows_in_another_dimension() -> None:
    key = StepKey(0)
    key.begin(0, ALL, 0)
    device = torch.device("cpu")
    first = dropped(key, "a#0", (64, 128, 3), 0.5, device=device)
    # Told so; for a length of 128 the rows of 64 would be found in the first dimension.
    second = dropped(key, "a#0", (128, 64, 3), 0.5, device=device, place=Place(rows_at=1))
    assert torch.equal(second, first.transpose(0, 1))


def test_a_tensor_without_rows_drops_the_same_on_every_rank() -> None:
    masks = []
    for rank in range(2):
        key = StepKey(0)
        key.begin(0, ALL[rank * 10 : rank * 10 + 10], rank)
        masks.append(dropped(key, "a#0", (1, 50), 0.5, device=torch.device("cpu")))
    assert torch.equal(*masks)


def test_microbatches_drop_what_the_whole_batch_does() -> None:
    model, key = nn.Sequential(nn.Dropout(0.5)), StepKey(0)
    use_counted_dropout(model, key)
    parts = []
    for rows in ALL.split(24):
        key.begin(2, rows, 0)
        parts.append(model(torch.ones(len(rows), 30)) != 0)
    assert torch.equal(torch.cat(parts), kept(nn.Dropout(0.5), ALL, 30, step=2))


def test_a_moment_comes_back_with_its_rows_and_calls() -> None:
    model = dropout(nn.Dropout(0.5), ALL[:8])
    key, ones = model[0].key, torch.ones(8, 30)
    moment = key.moment()
    first = model(ones)
    key.begin(1, ALL[8:20], 0)
    later = model(torch.ones(12, 30))
    with key.replaying(moment):
        assert torch.equal(model(ones), first)
    key.calls.clear()
    assert torch.equal(model(torch.ones(12, 30)), later)
