"""Metrics against a loop over examples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import BadExample, UsageError, UserCodeError
from shoal.learn import build_metrics
from shoal.recipe import METRICS

SCORES = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.randint(7, (40,), generator=torch.Generator().manual_seed(1))


def metric(name: str, ignore_index: int | None = None):
    return build_metrics([name], ignore_index)[name]


def plain(scores, labels, k: int, ignore=None) -> tuple[int, int]:
    right = count = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        if label != ignore:
            best = sorted(range(len(row)), key=lambda index: -row[index])[:k]
            right, count = right + (label in best), count + 1
    return right, count


@pytest.mark.parametrize(("name", "k"), [("accuracy", 1), ("top5", 5)])
@pytest.mark.parametrize("ignore", [None, 3])
@pytest.mark.parametrize("classes", [7, 4, 5])
def test_shares_are_those_of_a_loop(name, k, ignore, classes):
    scores, labels = SCORES[:, :classes], LABELS % classes
    right, count = metric(name, ignore)(scores, labels)
    assert (right.item(), count.item()) == plain(scores, labels, min(k, classes), ignore)
    assert (right.dtype, count.dtype, right.dim(), count.dim()) == (torch.float64,) * 2 + (0, 0)


def test_tokens_count_each_in_both_layouts():
    scores, labels = SCORES.reshape(8, 5, 7), LABELS.reshape(8, 5)
    expected = plain(SCORES, LABELS, 1, 2)
    for outputs in (scores, scores.movedim(-1, 1)):
        right, count = metric("accuracy", 2)(outputs, labels)
        assert (right.item(), count.item()) == expected


@given(cut=st.integers(0, 40))
@settings(max_examples=20, deadline=None)
def test_parts_add_up_exactly(cut):
    ours = metric("top5", 1)
    whole = ours(SCORES, LABELS)
    first, second = ours(SCORES[:cut], LABELS[:cut]), ours(SCORES[cut:], LABELS[cut:])
    assert [a + b for a, b in zip(first, second, strict=True)] == list(whole)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_one_logit_is_split_at_zero(shape, dtype):
    logits = torch.tensor([-2.0, 3.0, -0.1, 0.1, 5.0, 0.0]).reshape(shape)
    targets = torch.tensor([0, 1, 1, 0, 1, 0]).to(dtype)
    right, count = metric("accuracy")(logits, targets)
    assert (right.item(), count.item()) == (4.0, 6.0)


def test_several_logits_an_example_count_as_shares():
    logits, targets = torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[1, 0], [1, 0]])
    right, count = metric("accuracy")(logits, targets)
    assert (right.item(), count.item()) == (1.5, 2.0)


def test_no_gradient_and_any_precision():
    outputs = SCORES.bfloat16().requires_grad_()
    right, _ = metric("accuracy")(outputs, LABELS)
    assert not right.requires_grad
    assert right.item() == plain(outputs.double(), LABELS, 1)[0]


def test_names():
    assert list(build_metrics(["top5", "loss", "accuracy"])) == ["top5", "accuracy"]
    assert list(build_metrics(METRICS)) == ["accuracy", "top5"]
    with pytest.raises(UsageError, match="did you mean accuracy"):
        build_metrics(["acuracy"])


def test_what_it_cannot_take_is_named():
    with pytest.raises(UserCodeError, match="top5 needs a score for each class"):
        metric("top5")(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(BadExample, match="target 7 in row 0"):
        metric("accuracy")(SCORES, LABELS.clamp(min=7))
    with pytest.raises(BadExample, match="a binary target is from 0 to 1"):
        metric("accuracy")(torch.zeros(3), torch.tensor([0.0, 2.5, 1.0]))
    with pytest.raises(UserCodeError, match="the model returned a dict"):
        metric("accuracy")({}, LABELS)
