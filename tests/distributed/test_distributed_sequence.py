"""Sequence parallelism beside one device, in float64, on real ranks; what it keeps, and sends."""

import copy
from typing import Any

import pytest
import tensor_models
import torch
from tensor_models import Gpt, Llama
from test_distributed_tensor import ALLOWED, difference, learn, run
from torch import nn

from shoal.comm import Groups
from shoal.parallel.tensor import (
    apply,
    comm_bytes,
    cut_model,
    cut_sequences,
    gather_outputs,
    plan,
)
from shoal.trace.traced import trace


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = {"gpt": lambda: Gpt(places=13), "llama": lambda: Llama("expand")}[name]()
    return model.double()


def equal(groups: Groups, name: str, parts: bool = True) -> dict[str, Any]:
    group, model = groups.world, model_of(name)
    inputs = tensor_models.ids(37, 13)
    whole = copy.deepcopy(model)
    traced = trace(model, inputs, len(inputs[0]))
    made = plan(traced, group.size, model)
    mine = apply(made, traced, model, group)
    lines = cut_sequences(mine, model, group) if parts else ()
    cut_model(made, model, group.rank)
    saved: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        kept.append(tensor)
        return tensor

    kept: list[Any] = []
    before = copy.deepcopy(group.counter.as_dict())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = run(mine, model, inputs)
    learn([(each * 1.0) for each in gather_outputs(outputs, mine, group)])
    after = group.counter.as_dict()
    full = gather_outputs(outputs, mine, group)
    expected = whole(*inputs)
    learn([expected])
    wrong = difference(full[0], expected)
    theirs = dict(whole.named_parameters())
    for key, each in model.named_parameters():
        assert each.grad is not None, key
        wanted = made.part(key, group.rank).take(theirs[key].grad)  # type: ignore[arg-type]
        assert difference(each.grad, wanted) <= ALLOWED, key
    kinds = ("reduce_scatter", "all_reduce")  # gathering the outputs is not the graph's
    moved = {
        kind: after.get(kind, {}).get("activation", 0) - before.get(kind, {}).get("activation", 0)
        for kind in kinds
    }
    counted = comm_bytes(mine, rows=len(inputs[0]))
    return {
        "wrong": wrong,
        "lines": lines,
        "saved": sum(saved.values()),
        "moved": moved,
        "counted": {kind: counted.get(kind, 0) for kind in kinds},
    }


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_uneven_parts_of_a_sequence_compute_what_one_device_computes(
    pool: Any, name: str, ranks: int
) -> None:
    for told in pool.run(equal, name, ranks=ranks):
        assert told["wrong"] <= ALLOWED
        assert "of sequences of 13 lie in parts" in told["lines"][0]
        assert told["moved"] == told["counted"]
        assert told["moved"]["reduce_scatter"] > 0


def test_less_is_saved_for_the_backward_pass(pool: Any) -> None:
    with_parts = pool.run(equal, "gpt", ranks=2)
    without = pool.run(equal, "gpt", False, ranks=2)
    for mine, theirs in zip(with_parts, without, strict=True):
        assert mine["saved"] < theirs["saved"]
