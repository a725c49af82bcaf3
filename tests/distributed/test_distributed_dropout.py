"""Dropout drops the same elements on one device and on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from onedevice import (
    Case,
    assembled,
    batches_of,
    compare,
    images,
    trace_job,
    train_plainly,
    train_split,
)
from torch import Tensor, nn
from torch.nn import functional

from shoal.comm import Groups

TOLERANCE = 1e-10


class Dropping(nn.Module):
    """Every kind of dropout; one layer that is called twice; a block that can be recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.channels = nn.Conv2d(1, 6, 3, padding=1), nn.Dropout2d(0.3)
        block = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.4, inplace=True))
        self.blocks = nn.Sequential(Twice(6, block), Twice(12, nn.Identity()))
        self.shared, self.head = nn.Dropout(0.1), nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.channels(self.conv(images)).mean((2, 3))
        return self.head(self.shared(self.blocks(self.shared(features))))


class Twice(nn.Module):
    """Drops before and after, with one layer."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.drop, self.mix, self.inner = nn.Dropout(0.2), nn.Linear(width, width), inner

    def forward(self, features: Tensor) -> Tensor:
        return self.inner(self.drop(self.mix(self.drop(features))))


def case(**options: Any) -> Case:
    return Case(build=Dropping, batches=batches_of(*images(43), 20, 4), **options)


def ones() -> Case:
    """A model that shows its masks."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 3, 1), nn.Dropout(0.5), nn.Dropout2d(0.25), nn.Flatten())

    inputs, targets = images(23, side=4)
    return Case(build=build, batches=batches_of(torch.ones_like(inputs), targets, 23, 2))


def _masks(groups: Groups, case: Case) -> list[list[list[bool]]]:
    """For each step, the rows of this rank: which elements are not zero."""
    from shoal.job import local_batch

    job = assembled(groups, case)
    found = []
    for step in range(len(case.batches)):
        batch, share = local_batch(job.workload.feed, step, groups.data.rank, job.replica, 0)
        found.append((job.replica.forward(batch, step, share) != 0).tolist())
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_same_elements_drop_on_any_number_of_ranks(pool: Any, ranks: int) -> None:
    alone = _masks(Groups.alone(), ones())
    assert alone[0] != alone[1]
    split = pool.run(_masks, ones(), ranks=ranks)
    for step, expected in enumerate(alone):
        assert [row for rank in split for row in rank[step]] == expected


@pytest.mark.parametrize(
    ("ranks", "recompute"), [(2, False), (3, False), (4, False), (1, True), (3, True)]
)
def test_training_with_dropout(pool: Any, ranks: int, recompute: bool, tmp_path: Path) -> None:
    expected = trace_job(Groups.alone(), case())
    ours = case(execution={"recompute": recompute})
    errors = compare(expected, train_split(pool, ranks, ours, tmp_path))
    assert max(errors.values()) <= TOLERANCE, errors


def test_dropout_does_drop() -> None:
    """The reference above is Shoal's own: see that it is not the model without dropout."""
    expected, found = train_plainly(case()), trace_job(Groups.alone(), case())
    assert not torch.equal(expected["0/output/0"], found["0/output/0"])
    zero = (found["0/gradient/conv.weight"].flatten(1) == 0).all(1)
    assert not zero.any()


class Functional(nn.Module):
    """Functional dropout of elements, channels and attention, and torch's own encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(1, 8, 4, 4), nn.Linear(8, 8)
        layers = [nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)]
        self.layers = nn.Sequential(*layers, Attend(), Attend())
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.dropout2d(self.conv(images), 0.2, self.training)
        tokens = self.embed(features.flatten(2).transpose(1, 2))
        tokens = functional.dropout(tokens.flatten(0, 1), 0.2).view_as(tokens)
        return self.head(self.layers(tokens).mean(1))


class Attend(nn.Module):
    """Causal attention of two heads, with what a person would write."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        chance = 0.3 if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=chance, is_causal=True)
        return x + functional.dropout(self.out(y.transpose(1, 2).flatten(2)), 0.1, self.training)


def functional_case(**options: Any) -> Case:
    return Case(build=Functional, batches=batches_of(*images(43), 20, 4), **options)


@pytest.mark.parametrize(
    ("ranks", "recompute"), [(2, False), (3, False), (4, False), (1, True), (3, True)]
)
def test_training_with_functional_dropout(
    pool: Any, ranks: int, recompute: bool, tmp_path: Path
) -> None:
    expected = trace_job(Groups.alone(), functional_case())
    ours = functional_case(execution={"recompute": recompute})
    errors = compare(expected, train_split(pool, ranks, ours, tmp_path))
    assert max(errors.values()) <= TOLERANCE, errors


def test_functional_dropout_does_drop() -> None:
    expected, found = train_plainly(functional_case()), trace_job(Groups.alone(), functional_case())
    assert not torch.allclose(expected["0/output/0"], found["0/output/0"])
    assert all(bool(v.isfinite().all()) for v in found.values())


def _replaced(groups: Groups, case: Case) -> list[Any]:
    """What of torch is not what it was before some steps of a training: attributes by identity."""
    import importlib

    names = ["", ".nn", ".nn.functional", ".Tensor", ".nn.Module", ".distributed", ".autograd"]
    names += [".random", ".overrides", ".utils.checkpoint", "._C._nn", "._C._VariableFunctions"]

    def owner(name: str) -> Any:
        try:
            return importlib.import_module(f"torch{name}")
        except ImportError:
            home, _, attribute = name.rpartition(".")
            return getattr(owner(home), attribute)

    def all_of(name: str) -> dict[str, Any]:
        found = owner(name)
        # What classes of C hold is made anew by each look, apart from their dictionary.
        known = vars(found) if isinstance(found, type) or hasattr(found, "__file__") else {}
        return {key: value for key, value in known.items() if not key.startswith("__")}

    before = {name: all_of(name) for name in names}
    job = assembled(groups, case)
    during: list[str] = []
    from shoal.job import local_batch

    def look(*_: Any) -> None:
        during.extend(_differ(before, {name: all_of(name) for name in names}))

    job.replica.model.register_forward_pre_hook(look)
    for step in range(2):
        batch, share = local_batch(job.workload.feed, step, groups.data.rank, job.replica, 0)
        job.replica.forward(batch, step, share)
    return [during, _differ(before, {name: all_of(name) for name in names}), len(before[".nn"])]


def _differ(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"torch{name}.{key}"
        for name, values in before.items()
        for key, value in values.items()
        if after[name].get(key) is not value
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_functional_dropout_replaces_nothing_of_torch(pool: Any, ranks: int) -> None:
    for during, after, seen in pool.run(_replaced, functional_case(), ranks=ranks):
        assert (during, after) == ([], [])
        assert seen > 100
