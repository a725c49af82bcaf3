"""Statistics groups in one process: how rows fall into them, and batch norm over them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.comm import Group
from shoal.errors import Refused, RunError
from shoal.parallel.batch_groups import BatchGroups, Span
from shoal.parallel.statistics import GroupBatchNorm, use_groups


def whole(normalize_over: int | None, examples: int) -> BatchGroups:
    """The groups of a batch that is all on this rank."""
    groups = BatchGroups(normalize_over, Group(0, 1))
    groups.begin(torch.arange(examples), examples, [(0, examples)])
    return groups


# ---- rows and groups


def test_the_picture_of_the_module() -> None:
    shares = [(0, 5), (5, 10)]
    for rank, expected in (
        (0, [(0, 0, 4), (1, 4, 5)]),
        (1, [(1, 0, 3), (2, 3, 5)]),
    ):
        groups = BatchGroups(4, Group(rank, 2))
        groups.begin(torch.arange(*shares[rank]), 10, shares)
        assert groups.count == 3
        assert groups.crosses
        assert [(s.group, s.rows.start, s.rows.stop) for s in groups.spans] == expected


@given(
    examples=st.integers(0, 60),
    size=st.none() | st.integers(1, 70),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    skipped=st.sets(st.integers(0, 59), max_size=5),
)
def test_every_row_lies_in_one_group(
    examples: int, size: int | None, cuts: list[int], skipped: set[int]
) -> None:
    edges = [0, *sorted(min(cut, examples) for cut in cuts), examples]
    shares = list(pairwise(edges))
    length = size or max(1, examples)
    for rank, (start, stop) in enumerate(shares):
        groups = BatchGroups(size, Group(rank, len(shares)))
        rows = torch.tensor([row for row in range(start, stop) if row not in skipped]).long()
        groups.begin(rows, examples, shares)
        found = [(span.group, int(row)) for span in groups.spans for row in rows[span.rows]]
        assert found == [(int(row) // length, int(row)) for row in rows]
        assert all(span.group < groups.count for span in groups.spans)
        split = any(0 < stop < examples and stop % length for _, stop in shares)
        assert groups.crosses == (split and len(shares) > 1)


def test_several_rows_an_example() -> None:
    assert whole(4, 10).spans_of(30) == (
        Span(0, slice(0, 12)),
        Span(1, slice(12, 24)),
        Span(2, slice(24, 30)),
    )
    # With the whole batch as one group any number of rows will do.
    assert whole(None, 10).spans_of(7) == (Span(0, slice(0, 7)),)
    with pytest.raises(RunError, match="7 rows for 10 examples"):
        whole(4, 10).spans_of(7)


# ---- batch norm


def twins(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A layer and its copy, with weights that are not all the same."""
    import copy

    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer.double(), copy.deepcopy(layer).double()


def finish(groups: BatchGroups) -> None:
    groups.send()
    groups.finish()


LAYERS = [
    lambda: nn.BatchNorm1d(3),
    lambda: nn.BatchNorm1d(3, momentum=None),
    lambda: nn.BatchNorm1d(3, affine=False),
    lambda: nn.BatchNorm1d(3, track_running_stats=False),
]


@pytest.mark.parametrize("make", LAYERS)
def test_groups_on_one_device_are_batches_one_after_the_other(make: Any) -> None:
    torch.manual_seed(0)
    layer, plain = twins(make())
    model = nn.Sequential(layer)
    for step in range(3):
        groups = whole(4, 10)
        use_groups(model, groups)
        ours = torch.randn(10, 3, 5, dtype=torch.float64, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        found, expected = model(ours), torch.cat([plain(part) for part in theirs.split(4)])
        finish(groups)
        torch.testing.assert_close(found, expected)
        for output, input in ((found, ours), (expected, theirs)):
            (output * torch.linspace(-1, 1, 5)).pow(3).sum().backward()
            assert input.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(dict(layer.named_buffers())[name], buffer, msg=f"{step}")


def test_statistics_that_are_not_to_be_tracked_are_left_alone() -> None:
    """As torch has it: also where that is said after the layer was made."""
    layer, plain = twins(nn.BatchNorm1d(3))
    for each in (layer, plain):
        each.track_running_stats = False
    groups = whole(None, 8)
    use_groups(nn.Sequential(layer), groups)
    input = torch.randn(8, 3, dtype=torch.float64) + 4
    torch.testing.assert_close(layer(input), plain(input))
    finish(groups)
    assert torch.equal(layer.running_mean, plain.running_mean)
    assert torch.equal(layer.num_batches_tracked, plain.num_batches_tracked)


def test_what_the_users_checkpoint_runs_again_is_not_counted_again() -> None:
    """Its second forward comes in the backward pass, when the statistics are on their way."""
    layer, plain = twins(nn.BatchNorm1d(3))
    groups = whole(4, 8)
    model = nn.Sequential(layer, nn.Tanh())
    use_groups(model, groups)
    input = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    output = checkpoint(model, input, use_reentrant=False)
    groups.send()
    output.pow(2).sum().backward()
    groups.finish()
    for part in input.detach().split(4):
        plain(part)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(plain.named_buffers()))


def test_a_group_of_unreadable_examples_leaves_no_trace() -> None:
    layer, plain = twins(nn.BatchNorm1d(3))
    groups = BatchGroups(4, Group(0, 1))
    rows = torch.tensor([0, 1, 2, 3, 8, 9])  # all of group 1 was skipped
    groups.begin(rows, 10, [(0, 10)])
    use_groups(nn.Sequential(layer), groups)
    input = torch.randn(6, 3, dtype=torch.float64) + 4
    torch.testing.assert_close(layer(input), torch.cat((plain(input[:4]), plain(input[4:]))))
    finish(groups)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    assert int(layer.num_batches_tracked) == 2


def test_a_frozen_layer_uses_what_it_has_learnt() -> None:
    layer, plain = twins(nn.BatchNorm1d(3))
    groups = whole(None, 8)
    use_groups(nn.Sequential(layer), groups)
    input = torch.randn(8, 3, dtype=torch.float64)
    assert torch.equal(layer.eval()(input), plain.eval()(input))
    finish(groups)
    assert int(layer.num_batches_tracked) == 0


def test_no_rows_still_lead_a_gradient_to_the_parameters() -> None:
    layer = nn.BatchNorm1d(3)
    groups = BatchGroups(2, Group(0, 1))
    groups.begin(torch.arange(0), 4, [(0, 4)])
    use_groups(nn.Sequential(layer), groups)
    layer(torch.empty(0, 3)).sum().backward()
    finish(groups)
    assert layer.weight.grad is not None
    assert not layer.weight.grad.any()
    assert int(layer.num_batches_tracked) == 0


def test_a_single_value_is_refused() -> None:
    groups = whole(4, 9)
    layer = nn.BatchNorm1d(3)
    use_groups(nn.Sequential(layer), groups)
    with pytest.raises(RunError, match="statistics group 2 holds one value per channel"):
        layer(torch.randn(9, 3))


def test_the_inputs_a_layer_refuses_stay_refused() -> None:
    layer = nn.BatchNorm2d(3)
    use_groups(nn.Sequential(layer), whole(None, 4))
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(4, 3))


# ---- layers stay what they are


class Derived(nn.BatchNorm2d):
    """A class of the user's without a forward of its own."""

    def described(self) -> str:
        return f"{self.num_features} features"


class Doubling(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(3)
        self.same = self.first
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 1), Derived(3))
        self.hidden = [self.first]
        self.synchronised = nn.SyncBatchNorm(3)


def test_names_hooks_classes_and_shared_layers_stay() -> None:
    model, calls = Several(), []
    model.first.register_forward_hook(lambda *_: calls.append(1))
    before = list(model.state_dict())
    assert use_groups(model, whole(None, 4)) == 3
    assert list(model.state_dict()) == before
    assert model.first is model.same is model.hidden[0]
    assert isinstance(model.first, nn.BatchNorm2d)
    assert isinstance(model.first, GroupBatchNorm)
    assert model.inner[1].described() == "3 features"
    model.first(torch.randn(4, 3, 2, 2))
    assert calls == [1]
    assert type(model.first) is not type(model.inner[1])


def test_the_model_itself_may_be_a_norm() -> None:
    model = nn.BatchNorm1d(3)
    assert use_groups(model, whole(None, 4)) == 1
    assert model(torch.randn(4, 3)).shape == (4, 3)


def test_a_forward_of_its_own_is_refused() -> None:
    with pytest.raises(Refused, match="1 is a Doubling"):
        use_groups(nn.Sequential(nn.Identity(), Doubling(3)), whole(None, 4))


def test_groups_can_be_given_again() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    use_groups(model, whole(None, 4))
    second = whole(2, 4)
    assert use_groups(model, second) == 1
    assert model[0].groups is second


def test_rows_without_weight_leave_no_trace() -> None:
    """A rank without a share computes on another's example: see `parallel.Share`."""
    layer = nn.BatchNorm1d(3)
    groups = BatchGroups(None, Group(0, 1))
    groups.begin(torch.arange(1), 4, [(4, 4)])
    assert groups.stands_in
    use_groups(nn.Sequential(layer), groups)
    output = layer(torch.full((1, 3), 1000.0, requires_grad=True))
    assert bool(output.isfinite().all())
    (output * 0.0).sum().backward()
    finish(groups)
    assert not layer.weight.grad.any()
    assert int(layer.num_batches_tracked) == 0
    assert not layer.running_mean.any()
