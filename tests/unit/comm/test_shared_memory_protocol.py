"""The protocol of `core.c`: every order of events in a model; the C under ThreadSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from protocol_model import Protocol, search

import shoal.comm.shared_memory

CORE = Path(shoal.comm.shared_memory.__file__).with_name("core.c")
HARNESS = Path(__file__).with_name("core_threads.c")


@pytest.mark.parametrize(
    ("ranks", "ticks"), [(2, 5), (3, 3), pytest.param(4, 2, marks=pytest.mark.long)]
)
def test_nothing_can_go_wrong_in_any_order(ranks: int, ticks: int) -> None:
    wrong, states = search(Protocol(ranks, ticks))
    assert wrong is None
    assert states > 1000


BUGS = {
    "slots": "reads half-written values",
    "arrives_before_it_has_written": "reads half-written values",
    "waits_for_the_next_rank_only": "reads values of tick",
    "looks_for_sleepers_before_arriving": "sleep for ever",
    "sleeps_whatever_it_has_seen": "sleep for ever",
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    planted: dict[str, Any] = {bug: 1 if bug == "slots" else True}
    wrong, _ = search(Protocol(3, 3, **planted))
    assert wrong is not None
    assert BUGS[bug] in wrong


def build(folder: Path, *options: str) -> Path:
    """The harness under ThreadSanitizer; skips where there is none."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    program = folder / "core_threads"
    command = [compiler, "-std=gnu11", "-O1", "-g", "-fsanitize=thread", *options]
    command += ["-I", str(CORE.parent), str(HARNESS), "-o", str(program), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "tsan" in done.stderr:
        pytest.skip("gcc has no ThreadSanitizer here")
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    done = subprocess.run(
        [str(program)], capture_output=True, text=True, env=environment, check=False
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    return done


def test_threads_over_one_memory_race_nowhere(tmp_path: Path) -> None:
    done = run(build(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "collectives, all right" in done.stdout


def test_the_sanitizer_would_see_a_race(tmp_path: Path) -> None:
    done = run(build(tmp_path, "-DRACY"))
    assert done.returncode == 66
    assert "data race" in done.stderr
