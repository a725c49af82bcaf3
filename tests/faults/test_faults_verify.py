"""`shoal verify` and `shoal.verify` as a person calls them: statuses, documents, plain scripts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = """
name: small
batch_size: 14
steps: 5
model: {name: mlp, widths: [8]}
data: {train: "digits:train"}
objective: cross_entropy
optimizer: {name: sgd, lr: 0.1}
"""
NOISY = """
import numpy
import torch
from torch import nn

class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        noise = numpy.random.default_rng().normal(size=(len(x), 64))  # nobody sees these drawn
        return self.linear(x.flatten(1) + torch.from_numpy(noise).to(x.dtype))

def build():
    return Noisy()
"""


def verify(folder, *options):
    (folder / "small.yaml").write_text(SMALL)
    command = [sys.executable, "-m", "shoal", "verify", "small.yaml", "--json", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout), done.stderr


def test_equal_is_status_0(tmp_path):
    status, document, _ = verify(tmp_path, "--strategy", "dp3")
    assert status == 0
    assert document["ok"]
    assert document["strategy"] == "dp3"
    assert max(error for error in document["max_error"].values() if error is not None) <= 1e-10


def test_different_is_status_1_with_a_cause(tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    status, document, _ = verify(tmp_path, "--strategy", "dp2", "--set", "model=noisy:build")
    assert status == 1
    assert not document["ok"]
    assert document["first_difference"]["kind"] == "output"
    assert "random numbers" in document["cause"]


@pytest.mark.parametrize("strategy", ["cp2", "dp15"])
def test_refused_is_status_2_with_a_document(tmp_path, strategy):
    status, document, errors = verify(tmp_path, "--strategy", strategy)
    assert status == 2
    assert document["refused"]
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "options", [["--strategy", "dp2+bf16"], ["-s", "dp2", "--dtype", "float32"]]
)
def test_lower_precision_is_held_against_one_devices_own(tmp_path, options):
    status, document, errors = verify(tmp_path, *options)
    assert status == 0, errors
    assert document["dtype"] in ("bfloat16", "float32")
    assert document["max_error"]["gradient"] > 1e-10
    assert document["one_device"]["gradient"] > 1e-10
    assert 0 < document["of_allowed"] <= 1


def test_a_runs_certificate_is_put_into_its_folder(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    run = [sys.executable, "-m", "shoal"]
    for command in (
        [*run, "train", "small.yaml", "--strategy", "dp2", "--out", "made"],
        [*run, "verify", "made"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "made" / "certificate.json").read_text())
    assert document["ok"]
    assert document["strategy"] == "dp2"
    assert document["checkpoint"]["same_bits"]


def test_readme_model_of_ones_own(tmp_path):
    """The README's two python blocks, as they stand there, in at most 15 lines."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    model, script = blocks[:2]
    assert len(model.splitlines()) + len(script.splitlines()) <= 20
    assert len(script.splitlines()) <= 15
    (tmp_path / "mine.py").write_text(model)
    (tmp_path / "check.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "dp2 computes what one device computes" in done.stdout


def test_functions_that_fail_are_refusals_not_exceptions(tmp_path):
    (tmp_path / "script.py").write_text(
        "import torch, shoal\n"
        "def model(): return torch.nn.Linear(3, 2)\n"
        "def batch(step): return torch.randn(4, 7), torch.zeros(4, dtype=torch.long)\n"
        "found = shoal.verify(model_fn=model, batch_fn=batch, strategy='dp2',\n"
        "                     loss_fn=torch.nn.functional.cross_entropy)\n"
        "print(found.ok, found.refused)\n"
        "print(shoal.verify(model_fn=model, strategy='dp2').refused)\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("False")
    assert "mat1 and mat2" in done.stdout
    assert "all of model_fn, batch_fn and loss_fn" in done.stdout
