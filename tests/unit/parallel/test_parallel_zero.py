"""The pieces of ZeRO on one process: the second tree of modules, rows, and offloading."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoal.layout import Part
from shoal.parallel.zero import Offloaded, Whole
from shoal.parallel.zero.twin import Twin, rows


@given(st.integers(0, 40), st.integers(1, 9))
def test_rows_are_those_of_torchs_chunks(size: int, ranks: int) -> None:
    found = [rows(size, ranks, rank) for rank in range(ranks)]
    chunks = [c.tolist() for c in torch.arange(size).chunk(ranks)] if size else []
    assert [list(range(*each)) for each in found if each[0] < each[1]] == chunks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.absent = None

    def forward(self, x):
        return self.last(self.first(self.norm(x)))


def test_the_second_tree_has_the_users_names_classes_ties_and_buffers() -> None:
    model = Net()
    twin = Twin(model)
    assert not list(twin.root.parameters())
    twin.fill(lambda parameter: nn.Parameter(parameter.detach()[:2]))
    assert [type(m) for m in twin.root.modules()] == [type(m) for m in model.modules()]
    assert list(twin.root.state_dict()) == list(model.state_dict())
    assert [n for n, _ in twin.root.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert twin.root.last.weight is twin.root.first.weight
    assert twin.root.norm.running_mean is model.norm.running_mean
    model.norm.running_mean = torch.ones(4)  # put in its place later, it is one tensor still
    assert twin.root.norm.running_mean is model.norm.running_mean
    assert model.first.weight.shape == (4, 4)


def test_offloading_updates_a_copy_and_brings_it_back() -> None:
    torch.manual_seed(0)
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    states = Offloaded(Whole(model))
    assert states.layout({"x": Part.whole((2,))}) == {"x": Part.whole((2,))}
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (states.holding, plain)]
    for step in range(3):
        x = torch.randn(5, 4) + step
        for net in (model, plain):
            net(x).square().sum().backward()
        states.take_gradients(0.5)
        for parameter in plain.parameters():
            parameter.grad *= 0.5
        torch.testing.assert_close(
            states.norm(), nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        states.spread()
        assert all(p.grad is None for p in model.parameters())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
