"""Objectives against plain float64 arithmetic, in every layout, split any way, and with no rows."""

import sys
import textwrap
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.errors import BadExample, ShoalError, UsageError, UserCodeError
from shoal.learn import Objective, UsersObjective, build_objective
from shoal.recipe import SIGNATURES, Component


def objective(name: str, **options) -> Objective:
    return build_objective(SimpleNamespace(name=name, options=options))


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def whole(high: int, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def plain_cross_entropy(scores: Tensor, targets: Tensor, smoothing: float, ignore) -> tuple:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, label in zip(scores.double(), targets.tolist(), strict=True):
        if label != ignore:
            logs = row - row.exp().sum().log()
            total = total - (1 - smoothing) * logs[label] - smoothing * logs.mean()
            count += 1
    return total, count


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore", [None, 2, -1])
def test_cross_entropy_is_the_plain_sum(smoothing, ignore):
    scores, targets = normal(9, 4), whole(4, 9)
    if ignore == -1:
        targets[::2] = -1
    total, count = objective("cross_entropy", label_smoothing=smoothing, ignore_index=ignore)(
        scores, targets
    )
    expected, labels = plain_cross_entropy(scores, targets, smoothing, ignore)
    torch.testing.assert_close(total, expected, rtol=1e-13, atol=0)
    assert count.item() == labels
    assert (count.dtype, count.dim(), count.requires_grad) == (torch.float64, 0, False)


@pytest.mark.parametrize("positions", [(5,), (5, 3)])
def test_both_layouts_of_sequences_are_the_flat_sum(positions):
    scores, targets = normal(2, *positions, 4), whole(4, 2, *positions)
    ours = objective("cross_entropy", ignore_index=0, label_smoothing=0.2)
    total, count = ours(scores, targets)
    expected, labels = plain_cross_entropy(scores.reshape(-1, 4), targets.reshape(-1), 0.2, 0)
    torch.testing.assert_close(total, expected)
    assert count.item() == labels
    torch.testing.assert_close(ours(scores.movedim(-1, 1), targets), (total, count))


def test_a_layout_that_could_be_either_is_refused():
    with pytest.raises(UserCodeError, match="classes may be second or last"):
        objective("cross_entropy")(normal(2, 4, 4), whole(4, 2, 4))
    square = normal(4, 4)
    total, _ = objective("cross_entropy")(square, whole(4, 4))
    torch.testing.assert_close(total, plain_cross_entropy(square, whole(4, 4), 0.0, None)[0])


@given(cuts=st.lists(st.integers(0, 12), max_size=4), name=st.sampled_from(["ce", "mse", "binary"]))
@settings(max_examples=40, deadline=None)
def test_parts_of_a_batch_add_up_however_it_is_cut(cuts, name):
    if name == "ce":
        outputs, targets = normal(12, 5), whole(5, 12)
        ours = objective("cross_entropy", ignore_index=3)
    else:
        outputs = normal(12, 3)
        targets = normal(12, 3, seed=2) if name == "mse" else whole(2, 12, 3)
        ours = objective(name)
    total, count = ours(outputs, targets)
    edges = [0, *sorted(cuts), 12]
    parts = [ours(outputs[a:b], targets[a:b]) for a, b in pairwise(edges)]
    torch.testing.assert_close(sum(part[0] for part in parts), total, rtol=1e-12, atol=1e-12)
    assert sum(part[1].item() for part in parts) == count.item()


def test_mse_is_the_sum_of_means_per_example():
    outputs, targets = normal(4, 3, 2), normal(4, 3, 2, seed=2)
    total, count = objective("mse")(outputs, targets)
    expected = sum(((o - t) ** 2).mean() for o, t in zip(outputs, targets, strict=True))
    torch.testing.assert_close(total, expected)
    assert count.item() == 4
    torch.testing.assert_close(
        objective("mse")(normal(4), normal(4, seed=2))[0],
        (normal(4) - normal(4, seed=2)).square().sum(),
    )


def test_one_output_for_each_number_is_not_stretched():
    outputs, targets = normal(5, 1), normal(5, seed=2)
    expected = (outputs[:, 0] - targets).square().sum()
    torch.testing.assert_close(objective("mse")(outputs, targets)[0], expected)
    with pytest.raises(UserCodeError, match=r"\[5, 2\] do not fit targets \[5\]"):
        objective("mse")(normal(5, 2), targets)
    with pytest.raises(UserCodeError, match=r"\[5\] do not fit targets \[5, 1\]"):
        objective("mse")(normal(5), normal(5, 1))


@pytest.mark.parametrize("name", ["mse", "binary"])
def test_labels_become_rows_of_one_1(name):
    outputs, labels = normal(6, 4), whole(4, 6)
    rows = torch.eye(4, dtype=torch.float64)[labels]
    torch.testing.assert_close(objective(name)(outputs, labels), objective(name)(outputs, rows))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6,), (6, 1), (6, 3)])
def test_binary_is_the_plain_sum(dtype, shape):
    logits, targets = normal(*shape), whole(2, *shape).to(dtype)
    share = torch.sigmoid(logits)
    plain = -(targets.double() * share.log() + (1 - targets.double()) * (1 - share).log())
    total, count = objective("binary")(logits, targets)
    torch.testing.assert_close(total, plain.reshape(6, -1).mean(1).sum())
    assert count.item() == 6
    if shape == (6, 1):
        torch.testing.assert_close(objective("binary")(logits, targets[:, 0])[0], total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_are_float32_at_least(dtype, autocast):
    outputs, labels = normal(512, 10).to(dtype), whole(10, 512)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for name in ("cross_entropy", "mse", "binary"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total, count = objective(name)(outputs, labels)
        assert (total.dtype, count.dtype) == (wanted, torch.float64)
        exact = objective(name)(outputs.double(), labels)[0]
        tolerance = 1e-13 if wanted == torch.float64 else 2e-6
        torch.testing.assert_close(total.double(), exact, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    ("name", "shape", "targets"),
    [
        ("cross_entropy", (0, 4), whole(4, 0)),
        ("cross_entropy", (0, 5, 4), whole(4, 0, 5)),
        ("mse", (0, 3), normal(0, 3)),
        ("mse", (0, 4), whole(4, 0)),
        ("binary", (0, 1), whole(2, 0)),
    ],
)
def test_no_rows_are_zero_with_a_gradient(name, shape, targets):
    weight = torch.ones(shape[-1], dtype=torch.float64, requires_grad=True)
    total, count = objective(name)(torch.empty(shape, dtype=torch.float64) * weight, targets)
    assert (total.item(), count.item(), total.requires_grad) == (0.0, 0.0, True)
    total.backward()
    assert (weight.grad == 0).all()


def test_a_batch_with_every_label_ignored_is_zero_too():
    outputs = normal(3, 4).requires_grad_()
    total, count = objective("cross_entropy", ignore_index=-1)(outputs, torch.full((3,), -1))
    total.backward()
    assert (total.item(), count.item(), outputs.grad.abs().max().item()) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (4, r"target 4 in row 2 of the batch; with 4 classes it is 0 to 3"),
        (-100, r"target -100 in row 2(.|\n)*ignore_index: -100"),
    ],
)
def test_a_label_out_of_range_is_named_with_its_row(label, said):
    targets = whole(4, 5)
    targets[2] = label
    with pytest.raises(BadExample, match=said):
        objective("cross_entropy")(normal(5, 4), targets)
    sequences = whole(4, 5, 3)
    sequences[2, 1] = label
    with pytest.raises(BadExample, match=said):
        objective("cross_entropy")(normal(5, 3, 4), sequences)


def test_a_binary_target_out_of_range_is_named():
    with pytest.raises(BadExample, match=r"target 7.0 in row 1 of the batch"):
        objective("binary")(normal(3, 1), torch.tensor([0, 7, 1]))


@pytest.mark.parametrize(
    ("outputs", "targets", "said"),
    [
        (normal(3, 4), whole(4, 2), r"\[3, 4\] do not fit targets \[2\]"),
        (normal(3, 4), normal(3), "targets are torch.float64; classes are integers"),
        ((normal(3, 4),), whole(4, 3), "the model returned a tuple"),
        (normal(3, 4), [1, 2, 3], "given a list"),
        (normal(3, 4).sum(), whole(4, 3), "the model returned a 0-d tensor"),
    ],
)
def test_what_cross_entropy_cannot_take_is_named(outputs, targets, said):
    with pytest.raises(UserCodeError, match=said):
        objective("cross_entropy")(outputs, targets)


def test_values_are_not_looked_at_where_there_are_none():
    outputs, targets = (
        torch.empty(3, 4, device="meta"),
        torch.empty(3, dtype=torch.int64, device="meta"),
    )
    total, count = objective("cross_entropy")(outputs, targets)
    assert (total.device.type, count.device.type) == ("meta", "meta")
    with torch._subclasses.FakeTensorMode():
        total, _ = objective("cross_entropy")(torch.empty(3, 4), torch.zeros(3, dtype=torch.int64))
    assert total.shape == ()


def test_every_signature_of_the_recipe_can_be_built():
    for name, signature in SIGNATURES["objective"].items():
        build_objective(Component(name=name, options=signature().options()))
    with pytest.raises(UsageError, match="did you mean cross_entropy"):
        objective("crossentropy")
    with pytest.raises(UsageError, match="smoothing"):
        objective("cross_entropy", smoothing=0.1)


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(
        textwrap.dedent(
            """
            import torch

            def mean(outputs, targets, power=2):
                return (outputs[:, 0] - targets).abs().pow(power).mean()

            def pair(outputs, targets, scale=1.0):
                keep = targets > 0
                return scale * outputs[:, 0][keep].sum(), keep.sum()

            def number(outputs, targets):
                return 3.0

            def rows(outputs, targets):
                return outputs

            def wrong(outputs, targets):
                raise ValueError("these do not go together")

            def wrong_count(outputs, targets):
                return outputs.sum(), "many"
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_losses", None)


@pytest.mark.usefixtures("own")
class TestUsersObjectives:
    def test_a_mean_is_over_the_first_dimension(self):
        outputs, targets = normal(5, 1), normal(5, seed=2)
        total, count = objective("own_losses:mean", power=3)(outputs, targets)
        torch.testing.assert_close(total, (outputs[:, 0] - targets).abs().pow(3).sum())
        assert count.item() == 5

    def test_a_sum_and_its_count(self):
        outputs, targets = normal(5, 1), torch.tensor([1, 0, 1, 0, 0])
        total, count = objective("own_losses.pair", scale=2.0)(outputs, targets)
        torch.testing.assert_close(total, 2 * (outputs[0, 0] + outputs[2, 0]))
        assert (count.item(), count.dtype) == (2.0, torch.float64)

    def test_no_rows_are_zero_for_a_mean_as_well(self):
        outputs = torch.empty(0, 1) * torch.ones(1, requires_grad=True)
        total, count = objective("own_losses:mean")(outputs, torch.empty(0))
        assert (total.item(), count.item(), total.requires_grad) == (0.0, 0.0, True)
        total.backward()

    def test_a_weight_function_counts_what_a_mean_is_over(self):
        def masked_mean(outputs, targets):
            keep = targets >= 0
            return outputs[keep].mean()

        ours = UsersObjective("masked", masked_mean, weight_fn=lambda targets: (targets >= 0).sum())
        outputs = normal(4).requires_grad_()
        total, count = ours(outputs, torch.tensor([1, -1, 1, -1]))
        torch.testing.assert_close(total, outputs[0] + outputs[2])
        assert count.item() == 2
        total, count = ours(outputs, torch.full((4,), -1))
        total.backward()
        assert (total.item(), count.item(), outputs.grad.abs().sum().item()) == (0.0, 0.0, 0.0)

    def test_outputs_and_targets_of_several_tensors(self):
        ours = UsersObjective("pairs", lambda outputs, targets: outputs["a"].mean())
        outputs = {"a": normal(3), "b": normal(3)}
        total, count = ours(outputs, (normal(3), normal(3)))
        torch.testing.assert_close(total, outputs["a"].sum())
        assert count.item() == 3

    def test_bf16_comes_back_as_float32(self):
        ours = UsersObjective("bf16", lambda outputs, targets: outputs.mean())
        total, _ = ours(torch.ones(3, dtype=torch.bfloat16), torch.ones(3))
        assert (total.dtype, total.item()) == (torch.float32, 3.0)

    @pytest.mark.parametrize(
        ("name", "error", "said"),
        [
            ("number", UserCodeError, "returned 3.0"),
            ("rows", UserCodeError, r"returned a tensor \[5, 1\]"),
            ("wrong", UserCodeError, "raised ValueError: these do not go together"),
            ("wrong_count", UserCodeError, "a count is one number, given 'many'"),
            ("maen", UsageError, "no attribute 'maen'(.|\n)*Did you mean mean"),
        ],
    )
    def test_what_is_wrong_is_named(self, name, error: type[ShoalError], said):
        with pytest.raises(error, match=said):
            objective(f"own_losses:{name}")(normal(5, 1), normal(5))

    def test_wrong_options_are_found_when_it_is_built(self):
        with pytest.raises(UsageError, match="unexpected keyword argument 'pwoer'"):
            objective("own_losses:mean", pwoer=3)
