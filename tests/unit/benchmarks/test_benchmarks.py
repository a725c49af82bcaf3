"""What the benchmarks compute from what they measure; nothing is timed here."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from shoal import models
from shoal.recipe import load_recipe

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def module(name: str) -> ModuleType:
    """A file of the benchmarks, as it is when one of them runs."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def sidebyside(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return module("sidebyside")


def rate(value: float) -> dict[str, float]:
    return {"samples_per_second": value}


def test_ratios_are_of_each_round(sidebyside: ModuleType) -> None:
    mine, other = [rate(10.0), rate(30.0)], [rate(5.0), rate(10.0)]
    assert sidebyside.ratios(mine, other) == [2.0, 3.0]
    assert sidebyside.ratios(mine, [rate(5.0), "crashed"]) == [2.0]
    assert sidebyside.ratios(["crashed", "crashed"], other) == []


def test_the_spread_is_median_smallest_largest(sidebyside: ModuleType) -> None:
    assert sidebyside.spread([3.0, 1.0, 1.5]) == "1.50 (1.00 to 3.00)"
    assert sidebyside.spread([3.0], 0) == "3 (3 to 3)"
    assert sidebyside.spread([]) == "–"


def test_geometric_means_by_round(sidebyside: ModuleType) -> None:
    assert sidebyside.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert sidebyside.means_by_round([[1.0, 2.0], [4.0, 8.0]]) == pytest.approx([2.0, 4.0])
    # A peer that did not run is no factor; one that stopped running ends the rounds.
    assert sidebyside.means_by_round([[1.0, 2.0], [], [4.0]]) == pytest.approx([2.0])
    assert sidebyside.means_by_round([[], []]) == []


def test_a_table(sidebyside: ModuleType) -> None:
    assert sidebyside.table(["", "rate"], [["a", "1"], ["b", ""]]) == (
        "|   | rate |\n| --- | --- |\n| a | 1 |\n| b |   |"
    )


def test_ways_take_turns_and_one_that_fails_is_not_tried_again(sidebyside: ModuleType) -> None:
    called = []

    def way(name: str, result: object) -> object:
        return lambda: called.append(name) or result

    ways = {"a": way("a", rate(1.0)), "b": way("b", "no such tool")}
    results = sidebyside.interleaved(ways, 3)
    assert called == ["a", "b", "a", "a"]
    assert results["b"] == ["no such tool"] * 3
    assert sidebyside.reason(results["b"]) == "no such tool"
    assert sidebyside.reason(results["a"]) is None
    assert sidebyside.values(results["a"], "samples_per_second") == [1.0] * 3


def ended(sidebyside: ModuleType, output: str, errors: str = "", status: int = 0) -> object:
    return sidebyside.Ended(output, errors, status, (7,)).document()


def test_the_document_of_a_run_is_found_among_other_lines(sidebyside: ModuleType) -> None:
    assert ended(sidebyside, 'hello\n{"rate": 1}\nbye\n') == {"rate": 1, "peaks": (7,)}
    over_lines = json.dumps({"rate": 2}, indent=2)
    assert ended(sidebyside, over_lines) == {"rate": 2, "peaks": (7,)}


def test_a_failed_run_says_why(sidebyside: ModuleType) -> None:
    errors = "Traceback\nImportError: no | tool\nW: cleaning up\n"
    said = ended(sidebyside, '{"rate": 1}', errors, 1)
    assert said == "ended with status 1: ImportError: no ∣ tool"
    assert ended(sidebyside, "", "", 3) == "ended with status 3: it said nothing"


@pytest.mark.parametrize("name", ["small-resnet", "transformer", "resnet101"])
def test_peers_are_given_the_recipes_model_batch_and_rate(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    workload = module("workloads").WORKLOADS[name]
    theirs = module("loaded").build_model(name)
    recipe = load_recipe(workload.recipe, ()).recipe
    side = {"small-resnet": 32, "resnet101": 56}.get(name)
    classes = 2 if name == "transformer" else 10
    ours = models.build(recipe.model, classes=classes, in_channels=1, image_size=side)
    assert str(theirs) == str(ours)
    assert (recipe.batch_size, recipe.steps) == (workload.batch, workload.steps)
    assert recipe.optimizer.name == "adamw"
    assert recipe.optimizer.options["lr"] == workload.lr
