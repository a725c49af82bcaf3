"""Parts of the data for models that learn apart: nothing twice, nothing lost, own orders."""

import itertools

import numpy as np
import pytest

from shoal.data import Member, MemberFeed, open_feed
from shoal.data.feed import Feed
from shoal.errors import Refused
from shoal.recipe import SourceSpec


def feed_of(batch_size: int = 50, seed: int = 0, **options: str) -> Feed:
    source = SourceSpec.model_validate("digits:train")
    return open_feed(source, batch_size=batch_size, seed=seed, shuffle=True, **options)


def epoch_of(feed: MemberFeed, epoch: int) -> list[int]:
    steps = range(epoch * feed.steps_per_epoch, (epoch + 1) * feed.steps_per_epoch)
    return [i for s in steps for i in feed.read(s, 0, feed.batch_examples(s)).ids.tolist()]


@pytest.mark.parametrize(("members", "batch_size"), [(1, 50), (2, 50), (3, 50), (7, 10), (5, 5)])
def test_the_parts_are_the_whole_set_and_stay_what_they_are(members: int, batch_size: int) -> None:
    whole = feed_of(batch_size)
    feeds = [MemberFeed(whole, Member(number, members)) for number in range(members)]
    first = [epoch_of(feed, 0) for feed in feeds]
    assert sorted(itertools.chain.from_iterable(first)) == list(range(whole.examples))
    for own, feed in zip(first, feeds, strict=True):
        again = epoch_of(feed, 1)
        assert sorted(again) == sorted(own)
        assert again != own
        assert len(own) == feed.examples


def test_the_members_batches_are_together_the_global_batch() -> None:
    whole = feed_of()
    feeds = [MemberFeed(whole, Member(number, 3)) for number in range(3)]
    for step in range(2 * whole.steps_per_epoch):
        sizes = [feed.batch_examples(step) for feed in feeds]
        assert sum(sizes) == whole.batch_examples(step)
        starts = np.cumsum([0, *sizes[:-1]]).tolist()
        assert [feed.first(step) for feed in feeds] == starts
        assert feeds[0].position(step) == whole.position(step)


def test_shares_are_whole_statistics_groups() -> None:
    feeds = [MemberFeed(feed_of(), Member(number, 3, unit=8)) for number in range(3)]
    assert [feed.batch_examples(0) for feed in feeds] == [24, 16, 10]


def test_a_range_of_a_batch_is_that_part_of_it() -> None:
    feed = MemberFeed(feed_of(), Member(1, 2))
    whole = feed.read(5, 0, 25)
    part = feed.read(5, 10, 20)
    assert part.ids.tolist() == whole.ids[10:20].tolist()
    assert part.rows.tolist() == list(range(10, 20))
    with pytest.raises(IndexError, match=r"20\.\.26 are not within the 25 of step 5"):
        feed.read(5, 20, 26)


def test_full_members_see_everything_in_orders_of_their_own() -> None:
    whole = feed_of()
    feeds = [MemberFeed(whole, Member(number, 2, full=True)) for number in range(2)]
    orders = [epoch_of(feed, 0) for feed in feeds]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(whole.examples))
    assert orders[0] != orders[1]
    # Rows that count for random choices are no other member's.
    assert feeds[1].first(0) - feeds[0].first(0) >= whole.batch_size


def test_other_seeds_make_other_parts() -> None:
    parts = [set(epoch_of(MemberFeed(feed_of(seed=s), Member(0, 2)), 0)) for s in (0, 1)]
    assert parts[0] != parts[1]


def test_a_tenth_is_left_out_with_the_classes_proportions() -> None:
    whole, kept, tenth = feed_of(), feed_of(tenth="left out"), feed_of(tenth="only")
    ids = [
        {
            i
            for s in range(f.steps_per_epoch)
            for i in f.read(s, 0, f.batch_examples(s)).ids.tolist()
        }
        for f in (kept, tenth)
    ]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == whole.examples
    assert tenth.examples == round(whole.examples / 10)
    counts = np.bincount(
        [int(t) for s in range(tenth.steps_per_epoch)
         for t in tenth.read(s, 0, tenth.batch_examples(s)).targets]
    )  # fmt: skip
    assert counts.min() >= 10
    assert counts.max() <= 18


def test_what_is_asked_for_ahead_is_read_once() -> None:
    feed = MemberFeed(feed_of(), Member(0, 2))
    feed.prefetch(3, 0, 25)
    assert feed.read(3, 0, 25).ids.tolist() == feed.read(3, 0, 25).ids.tolist()


def test_a_member_that_would_never_see_an_example_is_refused() -> None:
    with pytest.raises(Refused, match=r"member 3 of 4 .* batches of 96 .* units of 32"):
        MemberFeed(feed_of(96), Member(3, 4, unit=32))
    assert MemberFeed(feed_of(96), Member(2, 3, unit=32)).examples > 0
