"""Tensor parallelism beside one device: outputs and every gradient, in float64, on real ranks."""

import copy
from typing import Any

import pytest
import tensor_models
import torch
from torch import Tensor, nn

from shoal.comm import Groups
from shoal.parallel.tensor import apply, comm_bytes, cut_model, gather_outputs, plan, wrap
from shoal.trace.traced import Traced, trace

ALLOWED = 1e-10


def difference(mine: Tensor, theirs: Tensor) -> float:
    """Largest error ÷ the largest number, of which 0.01 is the smallest that counts."""
    mine, theirs = mine.detach(), theirs.detach()
    assert mine.shape == theirs.shape
    if not theirs.numel():
        return 0.0
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-2))


def run(traced: Traced, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    (segment,) = traced.segment([])
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    given = {**dict(zip(traced.inputs, traced.flatten(inputs), strict=True)), **state}
    results = segment.callable()(given)
    return [results[name] for name in segment.outputs]


def learn(outputs: list[Tensor]) -> None:
    """Some gradient for every output, the same whoever asks."""
    torch.manual_seed(1)
    total = sum((each * torch.randn(each.shape, dtype=each.dtype)).sum() for each in outputs)
    assert isinstance(total, Tensor)
    total.backward()


def equal(groups: Groups, name: str, mode: str) -> dict[str, Any]:
    group = groups.world
    model, inputs = tensor_models.case(name)
    whole = copy.deepcopy(model)
    traced = trace(model, inputs, len(inputs[0]))
    made = plan(traced, group.size, model)
    if mode == "eval":
        traced = trace(model.eval(), inputs, len(inputs[0]))
        whole.eval()
    mine = apply(made, traced, model, group)
    cut_model(made, model, group.rank)
    assert {key: each.shape for key, each in model.named_parameters()} == {
        key: made.part(key, group.rank).shape for key, _ in whole.named_parameters()
    }
    fewer = tuple(each[:2] for each in inputs)  # rows are free
    expected = whole(*fewer)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    before = group.counter.as_dict().get("all_reduce", {}).get("activation", 0)
    outputs = run(mine, model, fewer)
    learn(expected)
    full = gather_outputs(outputs, mine, group)
    learn(full)
    after = group.counter.as_dict().get("all_reduce", {}).get("activation", 0)
    wrong = max(difference(a, b) for a, b in zip(full, expected, strict=True))
    theirs = {**dict(whole.named_parameters()), **dict(whole.named_buffers())}
    for key, each in [*model.named_parameters(), *model.named_buffers()]:
        trained = isinstance(each, nn.Parameter)
        mine_of, theirs_of = (each.grad, theirs[key].grad) if trained else (each, theirs[key])
        assert (mine_of is None) == (theirs_of is None), key
        if mine_of is not None:
            error = difference(mine_of, made.part(key, group.rank).take(theirs_of))
            assert error <= ALLOWED, f"{name}: {key}: {error}"
    counted = comm_bytes(mine, rows=2).get("all_reduce", 0)
    return {"wrong": wrong, "cut": made.share_cut, "moved": after - before, "counted": counted}


@pytest.mark.parametrize("name", tensor_models.CASES)
def test_two_ranks_compute_what_one_computes(pool: Any, name: str) -> None:
    for told in pool.run(equal, name, "train", ranks=2):
        assert told["wrong"] <= ALLOWED
        assert (told["cut"] == 0) == (name in tensor_models.WHOLE)
        assert told["moved"] == told["counted"]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("mlp", 3),
        ("resnet depthwise", 3),
        ("densenet", 3),
        ("llama expand", 3),
        ("llama interleave", 3),
        ("gated", 3),
        ("vit, heads last", 3),
        ("gpt", 4),
        ("unet", 4),
    ],
)
def test_uneven_parts_compute_what_one_computes(pool: Any, name: str, ranks: int) -> None:
    assert max(told["wrong"] for told in pool.run(equal, name, "train", ranks=ranks)) <= ALLOWED


@pytest.mark.parametrize("name", ["resnet bottleneck", "gpt", "torch encoder"])
def test_the_same_plan_cuts_the_graph_of_evaluation(pool: Any, name: str) -> None:
    assert max(told["wrong"] for told in pool.run(equal, name, "eval", ranks=2)) <= ALLOWED


def loss_of_cut_scores(groups: Groups) -> list[float]:
    group = groups.world
    model, inputs = tensor_models.case("gpt")
    whole = copy.deepcopy(model)
    targets = inputs[0].roll(-1, 1)
    targets[0, :3] = -100
    loss = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    traced = trace(model, inputs, 3)
    made = plan(traced, group.size, model)
    mine = apply(made, traced, model, group)
    cut_model(made, model, group.rank)
    (scores,) = wrap(run(mine, model, inputs), mine, group)
    assert scores.shape == (3, 8, 37)
    got = loss(scores.view(-1, scores.size(-1)), targets.view(-1))
    assert "activation" not in group.counter.as_dict().get("all_gather", {})
    got.backward()
    expected = loss(whole(*inputs).view(-1, 37), targets.view(-1))
    expected.backward()
    errors = [float((got - expected).detach().abs())]
    theirs = dict(whole.named_parameters())
    for key, each in model.named_parameters():
        assert each.grad is not None
        errors.append(difference(each.grad, made.part(key, group.rank).take(theirs[key].grad)))
    return errors


def test_a_loss_of_scores_that_stay_cut(pool: Any) -> None:
    for errors in pool.run(loss_of_cut_scores, ranks=3):
        assert max(errors) <= ALLOWED
