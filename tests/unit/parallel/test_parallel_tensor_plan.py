"""Plans of tensor parallelism on traced graphs: what is cut, into what, and why the rest is not."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.comm import Group
from shoal.layout import check_cover
from shoal.parallel.tensor import TensorPlan, apply, comm_bytes, cut_model, plan
from shoal.trace.traced import trace


def planned(model: nn.Module, *inputs: Tensor, ranks: int = 2) -> TensorPlan:
    return plan(trace(model, inputs, len(inputs[0])), ranks, model)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 5))


class Heads(nn.Module):
    def __init__(self, heads: int = 5, width: int = 20) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, places, width = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (y.view(n, places, self.heads, -1).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, places, width))


def test_hidden_channels_are_cut_and_the_last_bias_is_not() -> None:
    made = planned(mlp(), torch.randn(4, 8))
    assert {name: cut.dim for name, cut in made.cuts.items()} == {
        "0.weight": 0,
        "0.bias": 0,
        "2.weight": 1,
    }
    assert made.part("2.weight", 1).shape == (5, 15)
    assert made.part("2.bias", 1).is_whole
    assert "0.weight, 0.bias, 2.weight: cut along 30, 15 a rank" in made.text()


def test_parts_of_all_ranks_cover_each_tensor() -> None:
    made = planned(Heads(), torch.randn(2, 6, 20), ranks=3)
    for name in made.shapes:
        boxes = [box for rank in range(3) for box in made.part(name, rank).boxes]
        check_cover(boxes)


def test_a_fused_weight_is_cut_by_heads_in_three_boxes() -> None:
    made = planned(Heads(), torch.randn(2, 6, 20))
    boxes = made.part("qkv.weight", 0).boxes
    assert [(box.offset[0], box.shape[0]) for box in boxes] == [(0, 12), (20, 12), (40, 12)]
    assert made.part("out.weight", 1).shape == (20, 8)
    assert "5 units" in made.text()


def test_fewer_units_than_ranks_stay_whole_by_name() -> None:
    made = planned(Heads(heads=2), torch.randn(2, 6, 20), ranks=3)
    assert not made.cuts
    assert "2 cannot be cut into 3" in made.text()
    assert made.warnings == ("nothing to cut: all parameters are whole on each rank",)


def test_a_norm_keeps_what_it_normalises_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 30), nn.LayerNorm(30), nn.Linear(30, 5))
    made = planned(model, torch.randn(4, 8))
    assert not {"0.bias", "1.weight", "1.bias"} & set(made.cuts)
    assert "normalises over it" in made.text()


def test_batch_norm_is_cut_with_its_channels() -> None:
    conv = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)
    made = planned(nn.Sequential(*conv), torch.randn(4, 3, 8, 8))
    assert made.part("1.running_var", 0).shape == (3,)
    assert made.part("1.num_batches_tracked", 0).is_whole


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 40)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(torch.fft.fft(h).real + h)


def test_an_operation_without_a_rule_keeps_its_operands_whole() -> None:
    made = planned(Odd(), torch.randn(4, 6))
    assert "a.weight" not in made.cuts
    assert "has no rule for being cut" in made.text()


def test_a_plan_is_the_same_each_time() -> None:
    model = Heads()
    assert planned(model, torch.randn(2, 6, 20)) == planned(model, torch.randn(2, 6, 20))


def test_the_model_is_cut_in_place_under_all_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.words = nn.Linear(8, 30), nn.Linear(30, 8), nn.Linear(8, 30)
            self.words.weight = self.first.weight
            self.last.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x)) + self.last(self.words(x))

    model = Twice()
    made = planned(model, torch.randn(4, 8))
    whole = model.first.weight.detach().clone()
    cut_model(made, model, 1)
    assert model.words.weight is model.first.weight
    assert torch.equal(model.first.weight, whole[15:])
    assert model.first.weight.is_leaf
    assert not model.last.weight.requires_grad


def test_communication_of_a_pair_is_one_sum_forward_and_one_backward() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.body = nn.LayerNorm(8), nn.Sequential(*mlp()[:2], nn.Linear(30, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(self.norm(x))

    model = Two()
    traced = trace(model, (torch.randn(4, 8),), 4)
    mine = apply(plan(traced, 2, model), traced, model, Group(0, 2))
    assert comm_bytes(mine, rows=10) == {"all_reduce": 2 * 10 * 8 * 4}
    assert comm_bytes(mine, rows=10, training=False) == {"all_reduce": 10 * 8 * 4}
    cut = [node.meta["cut"] for node in mine.graph.nodes if "relu" in node.name]
    assert cut == [(1, 0, 30, ())]
