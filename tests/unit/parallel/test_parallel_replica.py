"""A replica alone: forward and backward, and what it says of code that is not its own."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.comm import Group, Groups, Pending
from shoal.errors import NoGradient, Refused, UserCodeError
from shoal.layout import Part
from shoal.learn.objectives import CrossEntropy
from shoal.parallel import Numerics, Replica, Share, build_replica
from shoal.sync import Alone, EveryStep, build_agreement


def replica(model: nn.Module, objective: Any = None, **options: Any) -> Replica:
    numerics = options.pop("numerics", Numerics(torch.float64))
    objective = objective or CrossEntropy()
    return build_replica(model, objective, numerics, group=Group(0, 1), seed=0, **options)


def batch(examples: int = 6) -> Any:
    return SimpleNamespace(
        inputs=torch.randn(examples, 4, dtype=torch.float64),
        targets=torch.arange(examples) % 3,
        rows=torch.arange(examples),
    )


def share(examples: int = 6) -> Share:
    return Share(examples, ((0, examples),))


def linear() -> nn.Module:
    return nn.Linear(4, 3).double()


def test_gradient_is_that_of_the_sum_over_the_global_count() -> None:
    model, data = linear(), batch()
    # Another rank has brought a loss of 5 over 14 examples.
    ours = replica(model)
    totals = ours.forward_backward(
        data, 0, share(), lambda local: Pending(local + torch.tensor([5.0, 14.0]))
    )
    ours.rescale(float(totals[1]))
    loss = nn.functional.cross_entropy(model(data.inputs), data.targets, reduction="sum")
    expected = torch.autograd.grad(loss / 20, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    torch.testing.assert_close(
        totals, torch.stack((loss.detach() + 5, torch.tensor(20.0))).double()
    )


def test_nothing_counted_anywhere_is_a_loss_and_a_gradient_of_zero() -> None:
    model = linear()
    totals = replica(model).forward_backward(batch(0), 0, share(0), Pending)
    assert totals.tolist() == [0.0, 0.0]
    assert not model.weight.grad.any()


def test_norm_of_the_whole_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    ours = replica(model)
    ours.forward_backward(batch(), 0, share(), Pending)
    every = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(ours.gradient_norm(), every.norm())


def test_layout_is_whole() -> None:
    layout = replica(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))).layout
    assert layout["1.weight"] == Part.whole((3, 4))
    assert layout["0.num_batches_tracked"] == Part.whole(())


def test_bf16_leaves_parameters_and_gradients_in_float32() -> None:
    model = nn.Linear(4, 3)
    ours = replica(model, numerics=Numerics(torch.float32, bf16=True))
    data = batch()
    data.inputs = data.inputs.float()
    ours.forward_backward(data, 0, share(), Pending)
    assert model.weight.grad.dtype == torch.float32
    assert ours.forward(data, 0, share()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "objective",
    [
        lambda outputs, _: ((outputs.argmax(1) == 0).double().sum(), torch.tensor(6.0)),
        lambda outputs, _: (outputs.detach().sum(), torch.tensor(6.0)),
    ],
    ids=["argmax", "detached"],
)
def test_a_loss_without_a_gradient_is_said(objective: Any) -> None:
    with pytest.raises(NoGradient, match="no parameter can learn") as error:
        replica(linear(), objective).forward_backward(batch(), 4, share(), Pending)
    assert error.value.step == 4


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, input: Tensor) -> Tensor:
        return {}["missing"]


def test_errors_of_the_users_model_and_objective_are_theirs() -> None:
    with pytest.raises(UserCodeError, match="the model's forward failed: KeyError") as error:
        replica(Failing()).forward_backward(batch(), 0, share(), Pending)
    assert "test_parallel_replica.py" in str(error.value)

    def objective(outputs: Tensor, targets: Tensor) -> Any:
        raise ValueError("my objective")

    with pytest.raises(UserCodeError, match="the objective failed: ValueError: my objective"):
        replica(linear(), objective).forward_backward(batch(), 0, share(), Pending)


def test_one_rank_and_the_whole_batch_keep_torchs_own_norm() -> None:
    plain = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    replica(plain)
    assert type(plain[0]) is nn.BatchNorm1d


def test_agreements_by_the_number_of_replicas() -> None:
    alone, pair = Group(0, 1), Group(1, 2)
    device = torch.device("cpu")
    assert isinstance(build_agreement(Groups.alone()), Alone)
    assert isinstance(build_agreement(Groups(pair, pair, pair, pair, device)), EveryStep)
    assert isinstance(build_agreement(Groups(pair, alone, alone, pair, device)), Alone)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(Refused, match="every parameter of this model is frozen"):
        EveryStep(Group(0, 2), Group(0, 2)).attach(replica(linear().requires_grad_(False)))


def test_a_rank_without_a_share_reads_the_first_example_without_weight() -> None:
    empty = Share(2, ((0, 1), (1, 2), (2, 2)))
    assert [empty.reads(rank) for rank in range(3)] == [(0, 1), (1, 2), (0, 1)]
    assert [empty.is_empty(rank) for rank in range(3)] == [False, False, True]
    model = linear()
    ours = replica(model)
    ours.body.capture = True
    totals = ours.forward_backward(batch(1), 0, Share(1, ((1, 1),)), Pending)
    assert totals.tolist() == [0.0, 0.0]
    assert not model.weight.grad.any()
    assert ours.body.captured.shape == (0, 3)


@dataclass(frozen=True)
class Answer:
    logits: Tensor
    parts: list[Tensor]
    name: str = "kept"


def test_outputs_are_captured_whatever_holds_them() -> None:
    class Answering(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            logits = super().forward(input)
            return {"answer": Answer(logits, [logits * 2, logits.sum()]), "number": 3}

    model = Answering(4, 3).double()
    ours = replica(model, lambda outputs, _: (outputs["answer"].logits.sum(), torch.tensor(6.0)))
    ours.body.capture = True
    ours.forward_backward(batch(), 0, share(), Pending)
    answer = ours.body.captured["answer"]
    assert ours.body.captured["number"] == 3
    assert answer.name == "kept"
    assert not answer.logits.requires_grad
    assert not answer.parts[1].requires_grad
    torch.testing.assert_close(answer.parts[0], answer.logits * 2)
