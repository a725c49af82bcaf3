"""From example numbers to pixels: out of one tensor in memory, or out of files decoded by threads.

    MemoryReader(images).fetch(ids)      one indexing of a tensor; no work per example
    FileReader(files, 224).begin(ids)    tasks of a few images each, for a pool of threads

Threads, not processes: Pillow lets go of the interpreter while it decodes and resizes, and nothing
can be left in shared memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shoal.data.batch import BadRecord
from shoal.data.decode import decode, quiet_pillow, reason
from shoal.data.sources import Arrays, Files, Images

_IMAGES_A_TASK: Final = 8
_MAX_THREADS: Final = 8


@dataclass(frozen=True, eq=False)
class Decoded:
    """Pixels uint8 [n, C, H, W] of the examples that could be read, in order, and the others.

    Of examples that are no images: what the model gets, int64 or float32 [n, …].
    """

    pixels: Tensor
    bad: tuple[BadRecord, ...] = ()


class Reader(ABC):
    """Gives the pixels of examples by number; ``labels`` int64 [N] are known beforehand."""

    labels: Tensor

    @abstractmethod
    def fetch(self, ids: NDArray[np.int64]) -> Decoded:
        """The pixels of these examples."""

    @abstractmethod
    def begin(self, ids: NDArray[np.int64]) -> Sequence[Future[Decoded]]:
        """Start to read these examples in the background; empty if there is nothing to gain."""

    @abstractmethod
    def finish(self, pending: Sequence[Future[Decoded]]) -> Decoded:
        """What `begin` started, joined."""

    @abstractmethod
    def close(self) -> None:
        """End what runs in the background."""


class MemoryReader(Reader):
    """Images held once, as a uint8 tensor; or token ids or features, in the model's type."""

    def __init__(self, examples: Images | Arrays) -> None:
        pixels = examples.pixels if isinstance(examples, Images) else examples.inputs
        # torch warns of memory that it may not write to, as the bytes of a file are.
        self._pixels = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        self.labels = torch.from_numpy(np.require(examples.labels, requirements=["C", "W"]))

    def fetch(self, ids: NDArray[np.int64]) -> Decoded:
        return Decoded(self._pixels.index_select(0, torch.from_numpy(ids)))

    def begin(self, ids: NDArray[np.int64]) -> Sequence[Future[Decoded]]:
        return ()

    def finish(self, pending: Sequence[Future[Decoded]]) -> Decoded:
        raise ValueError("nothing was begun")

    def close(self) -> None:
        return None


class FileReader(Reader):
    """Image files, decoded to squares of one size by as many threads as torch computes with."""

    def __init__(self, files: Files, image_size: int) -> None:
        quiet_pillow()
        self._files = files
        self._image_size = image_size
        self.labels = torch.from_numpy(files.labels)
        self._pool: ThreadPoolExecutor | None = None

    def fetch(self, ids: NDArray[np.int64]) -> Decoded:
        return self.finish(self.begin(ids))

    def begin(self, ids: NDArray[np.int64]) -> Sequence[Future[Decoded]]:
        if self._pool is None:
            threads = min(_MAX_THREADS, torch.get_num_threads())
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="shoal-decode")
        parts = (ids[at : at + _IMAGES_A_TASK] for at in range(0, len(ids), _IMAGES_A_TASK))
        return [self._pool.submit(_decode_all, self._files, self._image_size, p) for p in parts]

    def finish(self, pending: Sequence[Future[Decoded]]) -> Decoded:
        parts = [future.result() for future in pending]
        none = torch.empty((0, 3, self._image_size, self._image_size), dtype=torch.uint8)
        return Decoded(
            pixels=torch.cat([none, *(part.pixels for part in parts)]),
            bad=tuple(record for part in parts for record in part.bad),
        )

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _decode_all(files: Files, image_size: int, ids: NDArray[np.int64]) -> Decoded:
    pixels = torch.empty((len(ids), 3, image_size, image_size), dtype=torch.uint8)
    bad: list[BadRecord] = []
    good = 0
    for example in ids.tolist():
        path = files.root / files.names[example]
        try:
            pixels[good] = torch.from_numpy(decode(path, image_size))
            good += 1
        except MemoryError:
            raise
        # Pillow's decoders raise a dozen kinds of exception on damaged files, and any of them
        # means that this example cannot be read.
        except Exception as error:
            bad.append(BadRecord(example, str(path), reason(path, error)))
    return Decoded(pixels[:good], tuple(bad))
