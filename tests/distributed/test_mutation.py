"""Planted bugs are found by `verify`, and named; healthy runs raise no alarm."""

import pytest

from mutation.hunt import FOUND, NAMED, hunt
from mutation.mutants import HEALTHY, MUTANTS

FEW = ("averaged", "masks repeated", "decay twice", "tied gradient dropped", "no sum forward")


def test_a_few_planted_bugs_are_found_and_named() -> None:
    verdict = hunt([mutant for mutant in MUTANTS if mutant.name in FEW])
    assert sorted(verdict.right) == sorted(FEW)


@pytest.mark.long
def test_planted_bugs_are_found_and_named_and_healthy_runs_are_quiet() -> None:
    assert len(MUTANTS) >= 30
    verdict = hunt([*MUTANTS, *HEALTHY])
    assert verdict.found >= FOUND, verdict
    assert verdict.named >= NAMED, verdict
    assert not verdict.alarms
