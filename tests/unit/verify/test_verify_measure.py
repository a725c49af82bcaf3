"""The contract's measure of error, and what the certificate makes of it."""

import json

import pytest
import torch

from shoal.verify.certificate import KINDS, Certificate, Difference
from shoal.verify.measure import error, errors, scale_of


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_is_relative_to_the_largest_value():
    assert error(double(1.0, 200.0), double(1.0, 100.0), scale=1.0) == pytest.approx(1.0)


def test_a_true_zero_does_not_cry_wolf():
    gradients = {"weight": double(2.0), "other": double(4.0), "key_bias": double(1e-17)}
    noisy = {**gradients, "key_bias": double(-1e-17)}
    assert scale_of(gradients.values()) == 2.0
    assert errors(noisy, gradients)["key_bias"] == pytest.approx(2e-17 / (0.001 * 2.0))


def test_zero_tensors_do_not_lower_the_scale():
    assert scale_of([double(0.0), double(0.0), double(3.0)]) == 3.0


def test_counters_are_absolute():
    assert error(torch.tensor(7), torch.tensor(5), scale=100.0) == 2.0


@pytest.mark.parametrize(
    ("mine", "reference"),
    [
        (double(1.0), double(1.0, 2.0)),
        (double(float("nan")), double(1.0)),
        (double(1.0), double(0.0)),
    ],
    ids=["shape", "nan", "no-scale"],
)
def test_what_cannot_be_compared_is_infinitely_far(mine, reference):
    assert error(mine, reference, scale=0.0) == float("inf")


def test_equal_zeros_and_empty_tensors_are_equal():
    assert error(double(0.0), double(0.0), scale=0.0) == 0.0
    assert error(double(), double(), scale=0.0) == 0.0


def test_a_name_on_one_side_only_is_a_difference():
    assert errors({"a": double(1.0)}, {"a": double(1.0), "b": double(1.0)})["b"] == float("inf")
    assert errors({"a": double(1.0), "c": double(1.0)}, {"a": double(1.0)})["c"] == float("inf")


def test_certificate_document_has_the_contract_keys(tmp_path):
    found = Certificate(
        False, "dp2", 3, dict.fromkeys(KINDS, 0.5), Difference("fc.weight", "gradient", 1, 0.5), "x"
    )
    document = json.loads(found.write(tmp_path / "new").read_text())
    wanted = {
        "ok",
        "strategy",
        "steps",
        "dtype",
        "max_error",
        "first_difference",
        "cause",
        "refused",
    }
    assert wanted <= document.keys()
    assert document["max_error"].keys() == set(KINDS)
    assert document["first_difference"] == {
        "name": "fc.weight", "kind": "gradient", "step": 1, "error": 0.5
    }  # fmt: skip
    assert not found
    assert "does NOT compute" in found.text()
    assert "fc.weight" in found.text()


def test_a_refusal_is_not_ok():
    refused = Certificate(False, "tp2", 3, refused="not in this version yet")
    assert not refused.ok
    assert refused.text().startswith("refused:")


def test_complex_tensors_differ_by_their_imaginary_parts_too() -> None:
    assert error(torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), 1.0) > 0.4
