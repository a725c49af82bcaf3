"""Who reads what, and how far training is: arithmetic."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from shoal.job.sharing import share_of, shares
from shoal.job.workload import Workload


@given(st.integers(0, 500), st.integers(1, 40))
def test_shares_cover_a_batch_once_in_order_and_evenly(examples, ranks):
    cuts = shares(examples, ranks)
    assert len(cuts) == ranks
    assert [p for start, stop in cuts for p in range(start, stop)] == list(range(examples))
    sizes = [stop - start for start, stop in cuts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_fifty_on_three():
    assert share_of(50, 3).shares == ((0, 17), (17, 34), (34, 50))


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 100))
def test_samples_before_a_step_are_the_sum_of_the_batches(examples, batch, total_steps):
    per_epoch = -(-examples // batch)

    def batch_examples(step):
        return min(batch, examples - step % per_epoch * batch)

    feed = SimpleNamespace(
        examples=examples, steps_per_epoch=per_epoch, batch_examples=batch_examples
    )
    work = Workload(None, None, None, None, feed, 0, total_steps)
    seen = 0
    for step in range(total_steps):
        assert work.samples_before(step) == seen
        seen += batch_examples(step)
    assert work.total_samples == seen
