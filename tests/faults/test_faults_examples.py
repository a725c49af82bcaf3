"""The examples, run as a person runs them: plain scripts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts as Linux does")


def run(name, *arguments, folder):
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


@linux
def test_replicas_that_do_not_fit_fail_in_words(tmp_path):
    done = run("does_not_fit.py", "dp2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    # With which tensor it begins depends on the allocator; that it says so, and where, does not.
    assert re.search(r"dp2: failed: rank \d, step \d: out of memory: .* \d+ bytes", done.stdout)
    assert "/zero3" in done.stdout


@linux
@pytest.mark.parametrize("strategy", ["dp2/zero3", "pp2"])
def test_ranks_that_share_the_model_train_within_the_same_limit(tmp_path, strategy):
    done = run("does_not_fit.py", strategy, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{strategy}: trained" in done.stdout, done.stdout


def test_a_model_of_a_plain_script_is_verified(tmp_path):
    done = run("verify_your_model.py", "dp2", "pp2", "tp2", "dp2/zero3", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.strip().split("\n\n")
    assert len(parts) == 4
    for part in parts:
        assert "computes what one device computes" in part
