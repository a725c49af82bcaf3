"""What a recipe and a run folder mean for an asynchronous run."""

from pathlib import Path

import pytest

from shoal.errors import RunFolderError
from shoal.recipe import Recipe
from shoal.run import Run
from shoal.sync.ledger import by_contribution, histogram
from shoal.train.asynchronous import plan_of

RECIPE = {
    "name": "small",
    "batch_size": 36,
    "steps": 12,
    "model": {"name": "mlp", "widths": [8]},
    "data": {"train": "digits:train"},
    "objective": "cross_entropy",
    "optimizer": {"name": "sgd", "lr": 0.1},
}


def test_boundaries_are_where_the_model_is_evaluated_or_saved() -> None:
    recipe = Recipe.from_dict(
        {**RECIPE, "evaluate": {"every": "4 steps"}, "checkpoint": {"every": "1 epoch"}}
    )
    plan = plan_of(recipe, steps_per_epoch=6)
    steps, found = 0, []
    while steps < 24:
        steps = plan.boundary_after(steps)
        found.append(steps)
    assert found == [4, 6, 8, 12, 16, 18, 20, 24]
    assert plan.every_s is None


def test_what_is_due_by_the_clock_has_boundaries_by_the_clock() -> None:
    recipe = Recipe.from_dict(
        {**RECIPE, "evaluate": {"every": "30s"}, "checkpoint": {"every": "10s"}}
    )
    plan = plan_of(recipe, steps_per_epoch=6)
    assert plan.every_s == 10.0
    assert plan.boundary_after(3) > 1_000_000


def line(step: int, base: int, **more: object) -> dict[str, object]:
    return {"step": step, "index": 0, "computed_on": base, "staleness": step - base, **more}


def test_a_resumed_run_drops_contributions_to_steps_that_are_done_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.staleness_log() as log:
        for step in range(6):
            log.add(line(step, step))
    run.cut_after(4)  # four steps are done: 0 to 3
    assert [each["step"] for each in run.staleness()] == [0, 1, 2, 3]


def test_a_histogram_leaves_out_what_was_refused() -> None:
    assert histogram([line(3, 1), line(3, 1), line(4, 4), line(5, 4, refused=True)]) == {
        "0": 1,
        "2": 2,
    }


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (line(3, 0), "staleness 2"),
        (line(3, 4), "version 4"),
        ({**line(3, 3), "index": 2}, "contribution 2"),
        ({"step": 1}, "no line of a ledger"),
        ({**line(3, 3), "step": "x"}, "no line of a ledger"),
    ],
)
def test_a_ledger_that_no_such_run_has_written_is_refused(
    bad: dict[str, object], said: str
) -> None:
    with pytest.raises(RunFolderError, match=said):
        by_contribution([line(0, 0), bad], Path("ledger"), each=2, bound=2)
