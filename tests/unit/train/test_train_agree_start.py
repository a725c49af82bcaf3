"""What ranks compare before the first step; a fake group stands for the others."""

import pytest
import torch
from torch import nn

from shoal.errors import NotFinite, RanksDiffer
from shoal.train.agree_start import (
    compare,
    describe_parameters,
    model_digests,
    not_finite,
    require_finite,
)


class Told:
    """A group in which the other ranks say what they are told to, call after call."""

    def __init__(self, *others):
        self.others = list(others)
        self.sent = []

    def all_gather_json(self, value, purpose):
        self.sent.append(value)
        other = self.others.pop(0)
        return [value, {**value, **other}]


def test_equal_is_silent():
    compare(Told({}), {"version of torch": "2.13.0"})


def test_a_difference_names_rank_item_and_both_values():
    with pytest.raises(RanksDiffer) as caught:
        compare(Told({"version of torch": "2.12.0"}), {"a": 1, "version of torch": "2.13.0"})
    assert caught.value.rank == 1
    assert caught.value.message == (
        'version of torch differs: rank 0 has "2.13.0", rank 1 has "2.12.0"'
    )


def test_an_item_that_one_rank_lacks():
    with pytest.raises(RanksDiffer, match="data differs: rank 0 has nothing, rank 1 has 7"):
        compare(Told({"data": 7}), {"data": None})


def test_of_tables_only_digests_travel_until_they_differ():
    table = {f"layer.{n}": "[8] float32" for n in range(100)}
    group = Told({})
    compare(group, {"parameters": table})
    assert len(str(group.sent)) < 100
    with pytest.raises(RanksDiffer, match=r"parameters: layer\.7 differs: .*\[8\].*\[9\]"):
        compare(Told({"parameters": "x"}, {"layer.7": "[9] float32"}), {"parameters": table})


def test_parameters_are_described_and_digested_by_name():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    described = describe_parameters(model)
    assert described["0.weight"] == "[3, 2] float32"
    assert described["1.num_batches_tracked"] == "[] int64"
    before = model_digests(model)
    with torch.no_grad():
        model[0].bias[1] += 1e-6
    after = model_digests(model)
    assert [name for name in before if before[name] != after[name]] == ["0.bias"]


def test_only_what_has_become_not_finite_is_refused():
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([float("-inf")]))
    never = not_finite(model)
    assert never == {"mask"}
    require_finite(model, 3, never)
    with torch.no_grad():
        model.bias[0] = float("nan")
    with pytest.raises(NotFinite, match="bias") as caught:
        require_finite(model, 3, never)
    assert caught.value.step == 3
