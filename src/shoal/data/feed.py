"""A feed gives the examples of any range of any step's global batch; it knows no ranks.

    step s of epoch e = s div S, S = ceil(N / B):  positions (s mod S) * B + [start, stop)
    example = order(position; N, seed, e)          or the position itself where nothing is shuffled

    feed = open_feed(train, batch_size=128, seed=0, shuffle=True, on_bad_example="raise")
    feed.prefetch(8, 64, 128)          # decoded in threads while step 7 is computed
    feed.read(8, 64, 128).inputs       # float32 [64, C, S, S]

Reading is a pure function of its arguments: ranges that cut a step in any way give, joined, what
the whole range gives.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.data.batch import BadRecord, Batch
from shoal.data.order import order
from shoal.data.readers import Decoded, FileReader, MemoryReader, Reader
from shoal.data.resolve import described
from shoal.data.sources import Arrays, Description, Files, Images, locate
from shoal.data.sources.base import highest_label
from shoal.data.splits import held_out
from shoal.data.splits import tenth as a_tenth
from shoal.data.transforms import Pipeline, as_they_are
from shoal.errors import BadExample, DataMissing
from shoal.recipe import SourceSpec

OnBadExample = Literal["raise", "skip"]
Tenth = Literal["included", "left out", "only"]
# (what was read, the examples' ids, epoch) -> what the model gets
Prepare = Callable[[torch.Tensor, NDArray[np.int64], int], torch.Tensor]


class Reading(NamedTuple):
    """How a feed reads: what every rank must agree on, besides the data."""

    batch_size: int
    seed: int
    shuffle: bool
    on_bad_example: OnBadExample


class _Ahead(NamedTuple):
    ids: NDArray[np.int64]
    pending: Sequence[Future[Decoded]]


class _Order:
    """`order` by blocks of positions, the last of which is kept.

    128 positions take about as long as 4,096: what numpy's calls cost, not what they compute.
    """

    BLOCK = 4096

    def __init__(self, examples: int, seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self._kept: tuple[int, int, NDArray[np.int64]] | None = None

    def between(self, epoch: int, first: int, last: int) -> NDArray[np.int64]:
        """The examples at positions [first, last) of an epoch."""
        parts = [np.empty(0, dtype=np.int64)]
        for number in range(first // self.BLOCK, -(-last // self.BLOCK)):
            begin = number * self.BLOCK
            block = self._block(epoch, number)
            parts.append(block[max(first - begin, 0) : max(last - begin, 0)])
        return np.concatenate(parts)

    def _block(self, epoch: int, number: int) -> NDArray[np.int64]:
        if self._kept is None or self._kept[:2] != (epoch, number):
            begin = number * self.BLOCK
            positions = np.arange(begin, min(begin + self.BLOCK, self._examples))
            places = order(positions, examples=self._examples, seed=self._seed, epoch=epoch)
            self._kept = (epoch, number, places)
        return self._kept[2]


class Feed:
    """The examples of one split, by step and range. See the module; made by `open_feed`.

    ``description`` says what is read. A feed of image files owns threads: `close` it, or use it as
    a context manager, to end them before it is collected.
    """

    def __init__(
        self,
        description: Description,
        reader: Reader,
        prepare: Prepare,
        reading: Reading,
        among: NDArray[np.int64] | None = None,
    ) -> None:
        self.description = description
        self.batch_size = reading.batch_size
        self.seed = reading.seed
        self._among = among
        self._reading = reading
        self._reader = reader
        self._prepare = prepare
        self._order = _Order(self.examples, reading.seed)
        self._ahead: _Ahead | None = None

    @property
    def examples(self) -> int:
        """How many examples an epoch has."""
        return self.description.examples if self._among is None else len(self._among)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes, by label."""
        return self.description.classes

    @property
    def fingerprint(self) -> str:
        """A digest of what is read: equal on two machines that read the same files."""
        return self.description.fingerprint

    @property
    def steps_per_epoch(self) -> int:
        """How many global batches an epoch has, the last one perhaps a partial one."""
        return -(-self.examples // self.batch_size)

    def batch_examples(self, step: int) -> int:
        """How many examples the global batch of a step has."""
        return min(self.batch_size, self.examples - self.position(step)["position"])

    def position(self, step: int) -> dict[str, int]:
        """Where a step begins: all the state that reading on from there needs."""
        if step < 0 or self.examples == 0:
            raise IndexError(f"no step {step} in a set of {self.examples} examples")
        epoch, within = divmod(step, self.steps_per_epoch)
        return {"epoch": epoch, "position": within * self.batch_size}

    def read(self, step: int, start: int, stop: int) -> Batch:
        """The examples at positions [start, stop) of a step's global batch.

        An example that cannot be read raises BadExample, or under "skip" is left out and noted in
        ``Batch.bad``; the others keep their rows and ids. An empty range gives tensors of 0 rows.
        """
        epoch, ids = self._ids(step, start, stop)
        return self._read(ids, epoch, step, start)

    def read_examples(self, places: NDArray[np.int64], epoch: int, step: int, first: int) -> Batch:
        """These examples of the set, in this order, as rows `first` and on of a step's batch."""
        return self._read(self._examples(places), epoch, step, first)

    def prefetch_examples(self, places: NDArray[np.int64]) -> None:
        """As `prefetch`, of these examples of the set."""
        self._prefetch(self._examples(places))

    def _read(self, ids: NDArray[np.int64], epoch: int, step: int, first: int) -> Batch:
        decoded = self._take(ids)
        if decoded.bad and self._reading.on_bad_example == "raise":
            raise _unreadable(decoded.bad, step)
        rows = np.arange(first, first + len(ids))
        if decoded.bad:
            kept = ~np.isin(ids, [record.id for record in decoded.bad])
            ids, rows = ids[kept], rows[kept]
        return Batch(
            inputs=self._prepare(decoded.pixels, ids, epoch),
            targets=self._reader.labels[torch.from_numpy(ids)],
            ids=torch.from_numpy(ids),
            rows=torch.from_numpy(rows),
            bad=decoded.bad,
        )

    def prefetch(self, step: int, start: int, stop: int) -> None:
        """Begin to decode a range that will be read next; one is kept, and a new one replaces it.

        What is held in memory needs none: nothing happens.
        """
        self._prefetch(self._ids(step, start, stop)[1])

    def _prefetch(self, ids: NDArray[np.int64]) -> None:
        if self._is_ahead(ids):
            return
        self._drop_ahead()
        pending = self._reader.begin(ids)
        self._ahead = _Ahead(ids, pending) if pending else None

    def close(self) -> None:
        """End the threads. The feed can be read on: they start again."""
        self._drop_ahead()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ids(self, step: int, start: int, stop: int) -> tuple[int, NDArray[np.int64]]:
        place, size = self.position(step), self.batch_examples(step)
        if not 0 <= start <= stop <= size:
            raise IndexError(f"positions {start}..{stop} are not within the {size} of step {step}")
        first, last = place["position"] + start, place["position"] + stop
        if not self._reading.shuffle:
            return place["epoch"], self._examples(np.arange(first, last))
        return place["epoch"], self._examples(self._order.between(place["epoch"], first, last))

    def _examples(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers in the split of examples among those that are read."""
        return places if self._among is None else self._among[places]

    def _is_ahead(self, ids: NDArray[np.int64]) -> bool:
        return self._ahead is not None and np.array_equal(self._ahead.ids, ids)

    def _take(self, ids: NDArray[np.int64]) -> Decoded:
        if self._ahead is not None and self._is_ahead(ids):
            pending, self._ahead = self._ahead.pending, None
            return self._reader.finish(pending)
        return self._reader.fetch(ids)

    def _drop_ahead(self) -> None:
        for future in self._ahead.pending if self._ahead else ():
            future.cancel()
        self._ahead = None


def open_feed(
    spec: SourceSpec,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool,
    on_bad_example: OnBadExample = "raise",
    tenth: Tenth = "included",
) -> Feed:
    """Open a split for reading; ``shuffle``, for training, orders by (seed, epoch) and augments.

    ``tenth``: a fixed tenth of the split, with the classes' proportions, may be "left out", or be
    all that is read ("only"): what models are chosen on that have not been trained on it.

    Raises DataMissing for a source that is not there or is damaged, and for a transform of images
    where there are none.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, given {batch_size}")
    source = locate(spec.source)
    loaded = source.load(spec.split)
    # A description leaves out labels that take long to read; here they have been read.
    about = replace(described(source, spec), highest_label=highest_label(loaded.labels))
    reader: Reader
    if isinstance(loaded, Files):
        reader = FileReader(loaded, spec.transform.image_size or loaded.image_size)
    else:
        reader = MemoryReader(loaded)
    prepare = _preparation(spec, loaded, about, seed if shuffle else None)
    reading = Reading(batch_size, seed, shuffle, on_bad_example)
    return Feed(about, reader, prepare, reading, _among(loaded.labels, tenth))


def _among(labels: NDArray[np.int64], tenth: Tenth) -> NDArray[np.int64] | None:
    """Which examples are read; None for all."""
    if tenth == "included":
        return None
    kinds = labels if labels.ndim == 1 else np.zeros(len(labels), dtype=np.int64)
    held = held_out(kinds, a_tenth(len(kinds)))
    return np.flatnonzero(held if tenth == "only" else ~held)


def _preparation(
    spec: SourceSpec, loaded: Images | Arrays | Files, about: Description, seed: int | None
) -> Prepare:
    """The transform of a source's examples; without a seed nothing is augmented."""
    transform = spec.transform
    if isinstance(loaded, Arrays):
        if transform.augment != "none":
            raise DataMissing(
                f"{about.name} holds {about.kind}, and the recipe asks for "
                f"augment: {transform.augment}, which is for images",
                hint="leave out transform.augment",
            )
        return as_they_are
    return Pipeline(
        scale=loaded.scale,
        # Files have been brought to their size when they were decoded.
        image_size=None if isinstance(loaded, Files) else transform.image_size,
        normalize=transform.normalize,
        augment="none" if seed is None else transform.augment,
        seed=seed or 0,
    )


def _unreadable(bad: tuple[BadRecord, ...], step: int) -> BadExample:
    first = bad[0]
    more = f" (and {len(bad) - 1} more of this batch)" if len(bad) > 1 else ""
    return BadExample(
        f"{first.where} cannot be read: {first.why}{more}",
        hint="repair or remove the file, or leave out what cannot be read: "
        "`--set data.on_bad_example=skip`",
        step=step,
    )
