"""The pieces of a staged replica, without ranks: rows, completion, backward passes in halves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shoal.comm import Group, Groups
from shoal.errors import Refused
from shoal.job.sharing import share_of, shares
from shoal.parallel import BatchGroups, Numerics, use_groups
from shoal.parallel.pipeline import StagedReplica, Staging, build_staged_replica
from shoal.parallel.pipeline.completion import Completion
from shoal.parallel.pipeline.microbatches import cut_groups, cut_rows, run_by
from shoal.parallel.pipeline.outputs import join
from shoal.parallel.pipeline.weights import Later, split_weights
from shoal.parallel.replica import user_error
from shoal.schedule import Action
from shoal.sync import Alone
from shoal.trace import trace
from shoal.trace.emit import emit


@given(rows=st.integers(0, 40), microbatches=st.integers(1, 9), size=st.integers(1, 7))
def test_rows_are_cut_evenly_and_groups_stay_whole(rows: int, microbatches: int, size: int) -> None:
    for pieces in (
        cut_rows(rows, microbatches),
        cut_groups([row // size for row in range(rows)], microbatches),
    ):
        assert len(pieces) == microbatches
        assert [row for piece in pieces for row in range(rows)[piece]] == list(range(rows))
    assert all(piece.start % size == 0 for piece in pieces if piece.start < rows)
    lengths = [piece.stop - piece.start for piece in cut_rows(rows, microbatches)]
    assert max(lengths) - min(lengths) <= 1
    assert sum(run_by(cut_rows(rows, microbatches))) == max(1, min(rows, microbatches))


@given(examples=st.integers(0, 60), ranks=st.integers(1, 6), size=st.integers(1, 9))
def test_shares_of_whole_groups(examples: int, ranks: int, size: int) -> None:
    found = shares(examples, ranks, multiple=size)
    assert [p for start, stop in found for p in range(start, stop)] == list(range(examples))
    assert all(start % size == 0 for start, _ in found if start < examples)


def test_outputs_are_joined_by_rows() -> None:
    first, second = torch.ones(6, 2), torch.zeros(4, 2)
    joined, mean, count = join(
        [[first, torch.tensor(1.0), torch.tensor(7)], [second, torch.tensor(6.0), torch.tensor(7)]],
        rows=[3, 2],
    )
    assert torch.equal(joined, torch.cat((first, second)))
    assert float(mean) == pytest.approx((3 * 1.0 + 2 * 6.0) / 5)
    assert int(count) == 7


def test_gradients_are_complete_with_the_last_action_of_every_chunk() -> None:
    shared, own, other = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    completion = Completion({0: [shared, own], 2: [shared, other]})
    told: list[set[int]] = []
    completion.tell(lambda parameters: told.append({id(p) for p in parameters}))
    actions = [Action("B", 2, 0), Action("B", 2, 1), Action("B", 0, 0), Action("B", 0, 1)]
    completion.begin([Action("F", 0, 0), *actions])
    finishing = []
    for action in actions:
        with completion.during(action):
            finishing.append([p for p in (shared, own, other) if completion.finishes(p)])
    assert [[id(p) for p in each] for each in finishing] == [
        [], [id(other)], [], [id(shared), id(own)]
    ]  # fmt: skip
    assert told == [{id(other)}, {id(shared), id(own)}]


class Many(nn.Module):
    """Every kind of node whose weights' gradients can wait, and some that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, groups=3, dilation=2, padding="same", bias=False)
        self.long = nn.Conv1d(6, 4, 3)
        self.linear, self.bare = nn.Linear(4, 5), nn.Linear(5, 5, bias=False)
        self.matrix, self.bias = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))
        self.norm, self.frozen = nn.LayerNorm(3), nn.Linear(3, 3).requires_grad_(False)
        self.again = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(torch.relu(self.conv(x)))
        x = self.bare(self.linear(self.long(x.flatten(2)).transpose(1, 2).relu()))
        x = self.norm(torch.addmm(self.bias, x.flatten(0, 1), self.matrix))
        return self.again(self.frozen(self.again(x)) @ self.again.weight)


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_later_have_the_gradients_of_autograd(bf16: bool) -> None:
    torch.manual_seed(0)
    model, inputs = Many(), torch.randn(3, 2, 8, 8)
    plain = trace(model, inputs, 3)
    split, later = plain.copy(), Later()
    assert split_weights(split, later) >= 9
    found = []
    for traced in (plain, split):
        model.zero_grad()
        values: dict[str, Any] = dict(model.named_parameters()) | {traced.inputs[0]: inputs}
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            made = traced.segment([])[0].callable()(values)
        (output,) = made.values()
        later.at = (0, 1)
        output.float().square().sum().backward()
        if traced is split:
            assert model.linear.weight.grad is None
            assert model.norm.weight.grad is not None
            later.run(0, 1)
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        assert found[1][name].dtype == expected.dtype
        torch.testing.assert_close(found[1][name], expected, rtol=2e-2 if bf16 else 1e-4, atol=1e-4)


def test_statistics_of_microbatches_are_those_of_the_step() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(10, 3, dtype=torch.float64)
    layers = []
    for pieces in ([slice(0, 10)], [slice(0, 4), slice(4, 8), slice(8, 10)]):
        layer = nn.BatchNorm1d(3, momentum=0.3).double()
        groups = BatchGroups(2, Group(0, 1))
        use_groups(layer, groups)
        groups.begin(torch.arange(10), 10, [(0, 10)])
        for piece in pieces:
            groups.microbatch(torch.arange(10)[piece])
            for call in range(2):  # the layer is called twice
                layer.normalise(inputs[piece] + call, layer.weight, layer.bias, call)
        groups.send()
        groups.finish()
        layers.append(layer)
    for kind in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(layers[0], kind), getattr(layers[1], kind)), kind
    assert int(layers[0].num_batches_tracked) == 10


# ---- one rank


def built(model: nn.Module, staging: Staging, **options: Any) -> StagedReplica:
    def objective(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return (outputs - targets).square().sum(), torch.tensor(float(len(targets)))

    return build_staged_replica(
        model, objective, Numerics(torch.float64), Groups.alone(), staging,
        torch.zeros(8, 4, dtype=torch.float64), seed=0, **options,
    )  # fmt: skip


def batch_of(rows: int) -> Any:
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    return SimpleNamespace(inputs=inputs, targets=inputs[:, :2] * 3, rows=torch.arange(rows))


def net(*more: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), *more, nn.Tanh(), nn.Linear(6, 2)]
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize(
    "staging", [Staging(), Staging("interleaved", 3, 3), Staging("zb", 4, 2), Staging("zbv", 2)]
)
def test_all_stages_on_one_rank(staging: Staging) -> None:
    model, plain = net(), net()
    replica = built(model, staging)
    for rows in (8, 3, 1):
        batch = batch_of(rows)
        agreement = Alone(Group(0, 1))
        share = share_of(rows, 1)
        totals = replica.forward_backward(batch, 0, share, agreement.share).tolist()
        replica.rescale(totals[1])
        expected = (plain(batch.inputs) - batch.targets).square().sum() / rows
        expected.backward()
        assert totals[0] / totals[1] == pytest.approx(float(expected.detach()), rel=1e-12)
        assert float(replica.gradient_norm()) == pytest.approx(
            float(nn.utils.get_total_norm([p.grad for p in plain.parameters()])), rel=1e-12
        )
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
        outputs = replica.forward(batch, 0, share)
        torch.testing.assert_close(outputs, plain(batch.inputs).detach(), rtol=1e-12, atol=1e-14)
        for each in (model, plain):
            each.zero_grad()
    assert set(replica.layout) == set(plain.state_dict())


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="batch norm over the whole batch in a pipeline of 3"):
        built(net(nn.BatchNorm1d(6)), Staging("1f1b", 3))
    built(net(nn.BatchNorm1d(6)), Staging("1f1b", 3), normalize_over=2)
    built(net(nn.BatchNorm1d(6)), Staging("1f1b", 1))
    with pytest.raises(Refused, match="of 9 stages needs 8 cuts, and the model has"):
        built(net(), Staging("interleaved", 2, 9))
    with pytest.raises(Refused, match="every parameter of this model is frozen"):
        built(net().requires_grad_(False), Staging())
    with pytest.raises(Refused, match="recompute: this model has no blocks"):
        built(nn.Linear(4, 2).double(), Staging(), recompute=True)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


def test_buffers_that_each_microbatch_would_change_are_refused() -> None:
    with pytest.raises(Refused, match="the forward pass changes the buffer calls"):
        built(Counting().double(), Staging("1f1b", 2))
    built(Counting().double(), Staging("1f1b", 1))


class Narrow(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.last = inner, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).relu())


def test_buffers_that_are_changed_by_another_name_are_refused_too() -> None:
    """Power iterations write to a detached view of a buffer."""
    model = Narrow(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))).double()
    with pytest.raises(Refused, match=r"the forward pass changes the buffer inner\.param"):
        built(model, Staging("1f1b", 2))
    built(model, Staging("1f1b", 1))


class Pairs(nn.Module):
    """Complex numbers as pairs of real ones, seen as complex in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.view(-1, 2, 2)) * torch.view_as_complex(self.weight)
        return torch.view_as_real(pairs).flatten(1)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(4, 4).double())  # type: ignore[no-any-return]


@pytest.mark.parametrize("inner", [Pairs, old_weight_norm])
def test_models_that_a_copy_without_memory_is_hard_to_make_of(inner: Any) -> None:
    built(Narrow(inner()).double(), Staging("1f1b", 2))


class LooksUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1)


def test_an_error_in_a_stage_names_the_users_line() -> None:
    model = LooksUp()
    run = emit(trace(model, (torch.zeros(3, 2, dtype=torch.long),), 3).graph)
    with pytest.raises(IndexError) as caught:
        run(model.table.weight, torch.full((3, 2), 9))
    said = user_error("the model's forward", caught.value)
    assert said.hint is not None
    assert said.hint.startswith(f"in {__file__}:")
    assert said.hint.endswith("return self.table(ids).sum(1)")
