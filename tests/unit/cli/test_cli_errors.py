"""What is found before any rank starts: status 2, one screen, and with --json one document."""

import json
import subprocess
import sys

import pytest
import yaml

from shoal.cli import main

RECIPE = {
    "name": "r",
    "batch_size": 2,
    "steps": 2,
    "model": "mlp",
    "data": {"train": "digits:train"},
    "objective": "cross_entropy",
    "optimizer": {"name": "sgd", "lr": 0.1},
}


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """``command("train", "r.yaml", …)``: status, standard output, standard error."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["shoal", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code or 0, *capfd.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope.yaml"], "nope.yaml: there is no such file"),
        (["r.yml"], "Did you mean r.yaml?"),
        (["r.yaml", "--set", "optimizer.lrr=1"], "optimizer.lrr: is not a known key"),
        (["r.yaml", "--set", "nonsense"], "nonsense"),
        (["r.yaml", "--strategy", "dp3"], "dp3 on a batch of 2: at most dp2"),
        (["r.yaml", "--strategy", ""], "an axis is missing"),
        (["r.yaml", "--strategy", "dq2"], "Did you mean dp2?"),
        (["r.yaml", "--strategy", "cp2"], "not in this version yet"),
        (["r.yaml", "--set", "data.train=empty"], "the folder empty holds no class folders"),
        (["r.yaml", "--set", "data.train=./gone"], "gone"),
        (["r.yaml", "--set", "model.classes=4"], "outside 0..3"),
        (["r.yaml", "--resume"], "no unfinished run of r"),
        (["r.yaml", "--resume", "--out", "empty"], "empty is not a run folder"),
        (["r.yaml", "--out", "r.yaml"], "r.yaml cannot be written to"),
        (["r.yaml", "--nope"], "No such option: --nope"),
        (["r.yaml", "--max-restarts", "-1"], "max-restarts"),
        ([], "Missing argument"),
    ],
)
def test_train_refuses(command, arguments, said):
    status, output, errors = command("train", *arguments, "--json")
    assert status == 2
    assert said.lower() in errors.lower()
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 16
    told = json.loads(output)["error"]
    assert told["message"].splitlines()[0] in errors
    assert "traceback" not in told or told["traceback"] is None


def test_debug_shows_the_traceback(command):
    status, output, errors = command("train", "nope.yaml", "--json", "--debug")
    assert status == 2
    assert "Traceback" in errors
    assert json.loads(output)["error"]["kind"] == "RecipeError"


def test_without_json_standard_output_is_empty(command):
    assert command("train", "nope.yaml")[:2] == (2, "")


def test_a_word_that_is_no_verb(command):
    status, output, errors = command("trai", "r.yaml")
    assert (status, output) == (2, "")
    assert "train" in errors


def test_help_and_version(command):
    status, output, _ = command("--help")
    assert status == 0
    assert "train" in output
    assert "verify" in output
    from shoal import __version__

    assert command("--version")[:2] == (0, f"shoal {__version__}\n")


def test_half_of_torchruns_variables(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, output, errors = command("train", "r.yaml", "--json")
    assert status == 2
    assert "torchrun is half set" in errors
    assert json.loads(output)["error"]["kind"] == "WorldError"


PRINTS = """
import os, subprocess
from shoal.cli.shared import output_kept, print_document

with output_kept():
    print("from Python", flush=True)
    os.write(1, b"from C")
    subprocess.run(["echo", "from a child"])
print_document({"x": [float("nan"), 1.5]})
"""


def test_only_the_document_is_on_standard_output():
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"x": [None, 1.5]}
    for said in ("from Python", "from C", "from a child"):
        assert said in done.stderr


def test_a_closed_standard_output_is_no_fault():
    code = PRINTS.replace('os.write(1, b"from C")', "pass")
    command = f"{sys.executable} -c '{code}' >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert "Traceback" not in done.stderr
