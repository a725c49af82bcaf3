"""Buckets: which parameters travel together, and what becomes of those that a step leaves out."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.comm import Group
from shoal.errors import Refused, RunError
from shoal.sync import EveryStep
from shoal.sync.bucket import cut


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in shapes]


def test_buckets_keep_the_order_and_the_limit() -> None:
    given = parameters((4,), (4,), (9,), (1,), (1,))
    buckets = cut(given, max_bytes=4 * 8)
    assert [[p.numel() for p in bucket.parameters] for bucket in buckets] == [[4, 4], [9], [1, 1]]
    assert [id(p) for bucket in buckets for p in bucket.parameters] == [id(p) for p in given]


def test_types_do_not_mix() -> None:
    given = parameters((2,)) + parameters((2,), dtype=torch.float64) + parameters((2,))
    buckets = cut(given, max_bytes=1 << 20)
    assert [bucket.flat.dtype for bucket in buckets] == [torch.float32, torch.float64]
    assert [len(bucket.parameters) for bucket in buckets] == [2, 1]


def test_gradients_keep_the_strides_of_their_parameters() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    cut_out = nn.Parameter(torch.randn(6, 4)[:, :2])  # not dense: its gradient is
    (bucket,) = cut([weight, cut_out], max_bytes=1 << 20)
    for parameter in (weight, cut_out):
        parameter.grad = torch.randn_like(parameter)
        bucket.arrived.add(id(parameter))
    expected = [weight.grad.clone(), cut_out.grad.clone()]
    bucket.fill()
    assert weight.grad.stride() == weight.stride()
    for parameter, gradient in zip((weight, cut_out), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
        assert parameter.grad.untyped_storage().data_ptr() == bucket.flat.data_ptr()


def test_a_parameter_that_only_another_rank_has_used_gets_its_gradient() -> None:
    used_here, used_there, used_nowhere = given = parameters((2,), (2,), (2,))
    (bucket,) = cut(given, max_bytes=1 << 20)
    used_here.grad = torch.ones(2)
    bucket.arrived.add(id(used_here))
    bucket.fill()
    # What another rank brings: gradients, then which were used.
    bucket.flat += torch.tensor([0.0, 0, 5, 6, 0, 0, 0, 1, 0])
    bucket.settle()
    assert used_here.grad.tolist() == [1, 1]
    assert used_there.grad.tolist() == [5, 6]
    assert used_nowhere.grad is None


class Replica:
    def __init__(self, model: nn.Module) -> None:
        self.model = self.holding = model


def test_a_gradient_that_comes_twice_is_refused() -> None:
    model, agreement = nn.Linear(2, 2), EveryStep(Group(0, 1), Group(0, 1))
    agreement.attach(Replica(model))
    agreement.share(torch.zeros(2, dtype=torch.float64))  # the last backward pass begins
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RunError, match="added to twice"):
        model(torch.ones(1, 2)).sum().backward()


def test_a_sparse_gradient_is_refused() -> None:
    model, agreement = nn.Embedding(4, 2, sparse=True), EveryStep(Group(0, 1), Group(0, 1))
    agreement.attach(Replica(model))
    agreement.share(torch.zeros(1))
    with pytest.raises(Refused, match="sparse"):
        model(torch.tensor([1])).sum().backward()


def test_parameters_left_out_of_one_step_are_there_in_the_next() -> None:
    model, agreement = (
        nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),
        EveryStep(Group(0, 1), Group(0, 1)),
    )
    replica = Replica(model)
    agreement.attach(replica)
    for layers in (1, 2, 1):
        model.zero_grad()
        x = torch.ones(1, 2)
        for layer in model[:layers]:
            x = layer(x)
        agreement.share(torch.zeros(1))
        x.sum().backward()
        agreement.agree(replica)
        assert [p.grad is not None for p in model.parameters()] == [True] * 2 + [layers == 2] * 2


class Accumulating(Replica):
    """One that adds to its gradients, and says when it has done."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.accumulation = self
        self.last = False

    def finishes(self, _parameter: Tensor) -> bool:
        return self.last

    def tell(self, listener: Any) -> None:
        self.completed = listener


def test_nothing_is_sent_before_a_gradient_is_complete() -> None:
    model = nn.Linear(2, 1)
    agreement, replica = EveryStep(Group(0, 1), Group(0, 1)), Accumulating(model)
    agreement.attach(replica)
    for replica.last, sent in ((False, 0), (False, 0), (True, 1)):
        model(torch.ones(1, 2)).sum().backward()
        assert agreement._sent == sent
    agreement.agree(replica)
    assert model.weight.grad.tolist() == [[3.0, 3.0]]
    model.zero_grad()
    replica.last = False
    model(torch.ones(1, 2)).sum().backward()
    replica.completed([model.weight])
    assert agreement._sent == 0
    replica.completed([model.bias])
    assert agreement._sent == 1
    agreement.agree(replica)


def test_gradients_of_microbatches_wait_for_the_last_one() -> None:
    """Also those of a layer that the last one does not use; each is sent once."""
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    agreement = EveryStep(Group(0, 1), Group(0, 1))
    replica = Replica(model)
    agreement.attach(replica)
    x = torch.ones(1, 2)
    for _ in range(2):
        model.zero_grad()
        model[1](model[0](x)).sum().backward()
        (bucket,) = agreement._buckets
        assert bucket.pending is None
        agreement.share(torch.zeros(1))
        model[0](x).sum().backward()
        agreement.agree(replica)
        assert model[0].bias.grad.tolist() == (1 + model[1].weight.sum(0)).tolist()
        assert model[1].bias.grad.tolist() == [1, 1]
