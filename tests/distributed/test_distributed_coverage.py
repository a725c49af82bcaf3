"""A sample of the coverage table: every model of the zoo once, every strategy once."""

import pytest

import cells
import plan
from zoo import SUBJECTS, Subject

SAMPLE = plan.sample()


def judge(outcome, subject):
    """A cell is equal or refused for a reason; what is known to wait for something is told."""
    if outcome.verdict == "absent":
        pytest.skip(outcome.reason)
    if not outcome.good and subject.waits_for is not None:
        pytest.xfail(f"waits for {subject.waits_for}")
    assert outcome.good, f"{outcome.verdict}: {outcome.reason}"
    if outcome.verdict == "equal":
        assert outcome.error is not None
        assert outcome.error <= 1e-10
    else:
        assert len(outcome.reason) > 20, "a refusal says why"


@pytest.mark.parametrize(("name", "strategy"), SAMPLE, ids=[" ".join(cell) for cell in SAMPLE])
def test_a_cell_is_equal_or_refused_with_a_reason(pool, name, strategy):
    subject = SUBJECTS[name]
    judge(cells.run_cell(pool, subject, strategy, timeout_s=100), subject)


# Replicas are not what this version has yet to learn: the whole columns hold today.
HOLDS = [name for name, subject in SUBJECTS.items() if name != "frozen" and not subject.waits_for]


@pytest.mark.long
@pytest.mark.parametrize("name", HOLDS)
def test_replicas_of_every_model_compute_what_one_device_does(pool, name):
    outcome = cells.run_cell(pool, SUBJECTS[name], "dp2", timeout_s=100)
    if outcome.verdict == "absent":
        pytest.skip(outcome.reason)
    assert outcome.verdict == "equal", outcome.reason


def test_a_frozen_model_is_refused_by_name(pool):
    outcome = cells.run_cell(pool, SUBJECTS["frozen"], "dp2")
    assert outcome.verdict == "refused"
    assert "nothing to train" in outcome.reason


def sleep_on_one_rank(step):
    import time

    import torch.distributed as dist

    if dist.get_rank() == 1:
        time.sleep(3600)
    return SUBJECTS["one-layer"].batch_fn(step)


def crash(step):
    raise ValueError(f"no batch {step}")


def of(batch_fn):
    base = SUBJECTS["one-layer"]
    return Subject("planted", base.model_fn, batch_fn, base.loss_fn, "")


def test_a_cell_that_hangs_is_ended_and_the_next_one_runs():
    with cells.LastingRanks(2) as ranks:
        outcome = cells.run_cell(ranks, of(sleep_on_one_rank), "dp2", timeout_s=8)
        assert (outcome.verdict, outcome.good) == ("hung", False)
        assert cells.run_cell(ranks, SUBJECTS["one-layer"], "dp2").verdict == "equal"


def test_a_cell_that_raises_is_no_refusal(pool):
    outcome = cells.run_cell(pool, of(crash), "dp2")
    assert (outcome.verdict, outcome.good) == ("broken", False)
    assert "no batch 0" in outcome.reason


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_the_whole_table_has_no_wrong_cell():
    wrong, waiting = [], set()
    with cells.LastingRanks(4) as ranks:
        for name, strategy in plan.every_cell():
            outcome = cells.run_cell(ranks, SUBJECTS[name], strategy)
            if not outcome.good and SUBJECTS[name].waits_for is None:
                wrong.append((name, strategy, outcome.verdict, outcome.reason))
            elif not outcome.good:
                waiting.add(name)
    assert not wrong
    # A model that waits for nothing any more must not be excused.
    assert waiting == {name for name, subject in SUBJECTS.items() if subject.waits_for}


def with_a_mask_that_no_checkpoint_has():
    import torch
    from torch import nn

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("mask", torch.rand(8), persistent=False)

        def forward(self, x):
            return self.last(self.first(x).relu() * self.mask)

    return Masked()


def with_a_token_for_each_row():
    import torch
    from torch import nn

    class Classed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.token = nn.Linear(6, 8), nn.Parameter(torch.randn(1, 8))
            self.drop, self.last = nn.Dropout(0.5), nn.Linear(16, 3)

        def forward(self, x):
            token = self.token.expand(len(x), -1)  # the number of rows, as a plain number
            return self.last(self.drop(torch.cat([token, self.first(x).relu()], 1)))

    return Classed()


def six_features(step):
    import torch

    made = torch.Generator().manual_seed(step)
    return torch.randn(5, 6, generator=made), torch.randint(3, (5,), generator=made)


@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        (with_a_mask_that_no_checkpoint_has, "tp2"),
        (with_a_token_for_each_row, "pp2"),
        (with_a_token_for_each_row, "tp2"),
    ],
)
def test_masks_of_their_own_and_rows_that_are_counted(pool, model, strategy):
    from torch.nn.functional import cross_entropy

    subject = Subject(model.__name__, model, six_features, cross_entropy, "")
    outcome = cells.run_cell(pool, subject, strategy, timeout_s=100)
    assert outcome.verdict == "equal", outcome.reason
