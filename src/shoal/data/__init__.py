"""Data: what is there, in which order it is read, and the examples of any part of any step.

    train, evaluate = data.resolve(recipe.data)          what is trained and evaluated on
    about = data.describe(train)                         classes, sizes, bytes; without torch
    feed = data.open_feed(train, batch_size=128, seed=0, shuffle=True, on_bad_example="raise")
    feed.read(step, start, stop)                         -> Batch: one part of one global batch

    keyed.py       random bits as a function of a key and a counter
    order.py       the global order, a function of (seed, epoch, position)
    splits.py      the tenth that is held out of a set that is not split
    sources/       one file a format: what is there, and the examples
    resolve.py     from the recipe's words to definite splits
    decode.py      an image file to pixels
    readers.py     pixels by example number, from memory or from files
    transforms.py  resize, augment, normalise a batch
    feed.py        steps and ranges
    members.py     the same for models that learn apart

`batch.py` and the last four need torch, which is imported when `open_feed`, `Feed` or `Batch` is
asked for.
"""

from typing import TYPE_CHECKING, Any

from shoal.data.order import order
from shoal.data.resolve import check_labels, describe, evaluation_spec, resolve
from shoal.data.sources import KNOWN_NAMES, Description, locate

if TYPE_CHECKING:
    from shoal.data.batch import BadRecord, Batch
    from shoal.data.feed import Feed, open_feed
    from shoal.data.members import Member, MemberFeed

__all__ = [
    "KNOWN_NAMES",
    "BadRecord",
    "Batch",
    "Description",
    "Feed",
    "Member",
    "MemberFeed",
    "check_labels",
    "describe",
    "evaluation_spec",
    "locate",
    "open_feed",
    "order",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name in ("Batch", "BadRecord"):
        from shoal.data import batch

        return getattr(batch, name)
    if name in ("Feed", "open_feed"):
        from shoal.data import feed

        return getattr(feed, name)
    if name in ("Member", "MemberFeed"):
        from shoal.data import members

        return getattr(members, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
