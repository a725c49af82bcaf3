"""When a run evaluates, saves and stops."""

import math

import pytest
import torch
from torch import nn

from shoal.errors import NoGradient, NotFinite
from shoal.recipe import StopSpec
from shoal.train.clock import Every, Stopwatch
from shoal.train.stop import Convergence
from shoal.units import Duration


def test_a_run_that_gets_no_better_stops_and_says_why(small):
    done = small.train(
        "optimizer.lr=0.0", "optimizer.momentum=0", "evaluate.every=2 steps",
        "stop={metric: loss, patience: 4 steps}", "checkpoint.every=1 step", steps=40,
    )  # fmt: skip
    assert (done["state"], done["steps"]) == ("done", 6)
    assert done["reason"].startswith("loss has not been better than 2.")
    assert "(step 2) for 4 steps" in done["reason"]
    # The two last ones, and the best beside them.
    assert small.checkpoints == [2, 5, 6]
    assert done["best"]["best_step"] == 2


def test_patience_may_be_in_seconds(small):
    done = small.train(
        "optimizer.lr=0.0", "optimizer.momentum=0", "evaluate.every=1 step",
        "stop={metric: accuracy, patience: 0.05s}", steps=100000,
    )  # fmt: skip
    assert done["state"] == "done"
    assert "accuracy has not been better than" in done["reason"]
    assert done["seconds"] < 30


def test_saving_by_the_clock(small):
    small.train("checkpoint.every=1ms", "checkpoint.keep=99")
    assert small.checkpoints[-1] == 12
    assert len(small.checkpoints) > 6


def test_only_due_evaluations_and_the_last_one_are_logged(small):
    done = small.train("evaluate.every=5 steps", "evaluate.metrics=[accuracy, top5]")
    evaluations = [line for line in small.run.metrics() if "evaluation" in line]
    assert [line["step"] for line in evaluations] == [5, 10, 12]
    assert evaluations[-1]["evaluation"] == done["metrics"]
    assert done["metrics"].keys() == {"loss", "accuracy", "top5"}


def test_without_an_evaluation_set_there_is_none(small):
    done = small.train("data.evaluate=null", "evaluate.every=2 steps")
    assert not [line for line in small.run.metrics() if "evaluation" in line]
    assert done["metrics"]["loss"] == small.run.metrics()[-1]["loss"]
    assert done["best"]["best"] is None


def test_a_learning_rate_that_is_far_too_high_is_told_of(small):
    with pytest.raises(NotFinite) as caught:
        small.train("optimizer.lr=1e30")
    assert caught.value.step is not None
    assert caught.value.rank == 0
    assert "optimizer.lr" in caught.value.hint


def test_weights_that_are_not_finite_are_never_saved(small):
    with pytest.raises(NotFinite, match="holds values that are not finite") as caught:
        small.train("optimizer.lr=1e39", "checkpoint.every=1 step", steps=1)
    assert caught.value.phase == "checkpoint"
    assert not small.run.checkpoints_path.exists()


class Masked(nn.Module):
    """A buffer with infinities from the start, as attention masks have."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))

    def forward(self, x):
        return self.linear(x.flatten(1))


def build_masked():
    return Masked()


def test_a_mask_of_infinities_is_no_fault(small):
    assert small.train(f"model={__name__}:build_masked")["state"] == "done"


def cut_off(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def test_a_loss_without_a_gradient_is_found_at_step_0(small):
    with pytest.raises(NoGradient) as caught:
        small.train(f"objective={__name__}:cut_off")
    assert (caught.value.step, caught.value.phase) == (0, "backward")


class Particular(nn.Module):
    """Keeps one part in evaluation mode while it trains."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.BatchNorm1d(64)
        self.linear = nn.Linear(64, 10)
        self.frozen.eval()

    def forward(self, x):
        if self.training:
            assert not self.frozen.training
        return self.linear(self.frozen(x.flatten(1)))


def build_particular():
    return Particular()


def test_evaluation_gives_every_module_its_mode_back(small):
    done = small.train(f"model={__name__}:build_particular", "evaluate.every=2 steps")
    assert done["state"] == "done"


def fails(outputs, targets):
    raise ZeroDivisionError("mine")


def test_whatever_user_code_raises_says_where(small):
    from shoal.errors import ShoalError

    with pytest.raises(ShoalError, match="mine") as caught:
        small.train(f"objective={__name__}:fails")
    assert (caught.value.rank, caught.value.step) == (None, 0) or caught.value.rank == 0
    assert "ZeroDivisionError" in str(caught.value)


def test_every_by_steps_epochs_and_seconds():
    assert [s for s in range(1, 10) if Every(Duration.parse("3 steps"), 5).due(s, 0)] == [3, 6, 9]
    assert [s for s in range(1, 12) if Every(Duration.parse("1 epoch"), 5).due(s, 0)] == [5, 10]
    clock = Every(Duration.parse("10s"), 5)
    assert [t for t in range(0, 45, 4) if clock.due(1, t)] == [12, 24, 36]


def test_the_stopwatch_books_all_time_once():
    watch = Stopwatch()
    watch.lap("one")
    watch.lap("two")
    watch.lap("one")
    assert set(watch.seconds) == {"one", "two"}
    assert all(seconds >= 0 for seconds in watch.seconds.values())


def test_convergence_knows_which_way_is_better():
    loss, accuracy = Convergence("loss"), Convergence("accuracy")
    values = [0.5, 0.4, 0.6, math.nan, 0.3]
    assert [loss.observe(s, s, {"loss": v}) for s, v in enumerate(values)] == [
        True, True, False, False, True,
    ]  # fmt: skip
    assert [accuracy.observe(s, s, {"accuracy": v}) for s, v in enumerate(values)] == [
        True, False, True, False, False,
    ]  # fmt: skip
    again = Convergence("loss")
    again.restore(loss.state())
    assert again == loss
    other = Convergence("accuracy")
    other.restore(loss.state())
    assert other.best is None


def test_patience_counts_from_the_best():
    stop = StopSpec(metric="loss", patience="2 epochs")
    seen = Convergence("loss", best=0.1, best_step=10, best_seconds=5.0)
    assert seen.exhausted(29, 0, stop, steps_per_epoch=10) is None
    assert "for 2 epochs" in seen.exhausted(30, 0, stop, steps_per_epoch=10)
    assert Convergence("loss").exhausted(99, 0, stop, 10) is None
    assert seen.exhausted(99, 0, None, 10) is None
