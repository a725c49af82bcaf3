"""The coverage table's sample and page; what importing Shoal does not import."""

import subprocess
import sys

import pytest

import cells
import page
import plan
from cells import Outcome
from zoo import SUBJECTS


@pytest.mark.parametrize(
    ("models", "strategies"),
    [
        (tuple("abcdefg"), ("x", "y", "z")),
        (("a", "b"), ("x", "y", "z", "w", "v")),
        (("a",), ("x",)),
    ],
)
def test_sample_covers_every_model_and_every_strategy_in_the_fewest_cells(models, strategies):
    cells = plan.sample(models, strategies)
    assert {model for model, _ in cells} == set(models)
    assert {strategy for _, strategy in cells} == set(strategies)
    assert len(cells) == max(len(models), len(strategies))


def test_names_in_the_zoo_are_unique():
    import zoo

    families = (
        zoo.images,
        zoo.sequences,
        zoo.perceptrons,
        zoo.others,
        zoo.hugging_face,
        zoo.awkward,
    )
    assert len(SUBJECTS) == sum(len(family.SUBJECTS) for family in families)


@pytest.mark.parametrize("name", SUBJECTS)
def test_batches_are_the_same_each_time_and_of_several_sizes(name):
    import torch
    from torch.utils._pytree import tree_leaves

    batch_fn = SUBJECTS[name].batch_fn
    for first, again in zip(tree_leaves(batch_fn(1)), tree_leaves(batch_fn(1)), strict=True):
        if isinstance(first, torch.Tensor):
            assert torch.equal(first, again)
    sizes = [len(tree_leaves(batch_fn(step)[1])[0]) for step in range(3)]
    assert len(set(sizes)) == 3 or name == "two-examples"


OUTCOMES = {
    ("gpt", "dp2"): Outcome("equal", 3e-15),
    ("gpt", "tp2"): Outcome("refused", reason="heads of 3 do not divide"),
    ("u-net", "dp2"): Outcome("wrong", 0.5, "output output | step 0: the forward pass differs"),
    ("u-net", "tp2"): Outcome("refused", reason="heads of 3 do not divide"),
    ("noise", "dp2"): Outcome("hung", reason="no answer within 9 s"),
    ("noise", "tp2"): Outcome("refused", reason="torch.randn in forward"),
}


def test_page_marks_cells_and_groups_reasons():
    lines = page.page(OUTCOMES).splitlines()
    (gpt,) = (line for line in lines if line.startswith("| gpt |"))
    assert gpt.endswith("| = | 1 | 3e-15 |")
    (unet,) = (line for line in lines if line.startswith("| u-net |"))
    assert unet.endswith("| **✗** | 1 |  |")
    assert "1. heads of 3 do not divide (gpt, u-net: tp2)" in lines
    assert "2. torch.randn in forward (noise: tp2)" in lines
    assert any("u-net under dp2: wrong. output output \\| step 0" in line for line in lines)
    assert any(line.startswith("- noise under dp2: hung.") for line in lines)
    assert any("1 are equal, 3 refused, 2 wrong" in line for line in lines)
    assert page.today() in page.page(OUTCOMES)


def test_a_table_has_as_many_columns_in_each_row():
    for block in page.page(OUTCOMES).split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({row.replace("\\|", "").count("|") for row in rows}) <= 1


def test_importing_shoal_and_the_zoo_does_not_import_transformers():
    code = (
        "import sys, shoal, shoal.verify.on_rank\n"
        "import zoo; len(zoo.SUBJECTS)\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{code}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "False"


def test_without_transformers_its_rows_are_absent_not_wrong(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    outcome = cells.run_cell(cells.LastingRanks(2), SUBJECTS["hf-gpt2"], "dp2")
    assert (outcome.verdict, outcome.good) == ("absent", True)
