"""What verification trains on: batches chosen so that every kind of share occurs.

step 0    the whole batch
step 1    a batch that does not divide by the number of replicas
step 2    the last, partial batch of the data; if that is whole, one with fewer examples than
          replicas, so that a share is empty (on three replicas and more)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from shoal.errors import UsageError
from shoal.job import Feed


@dataclass(frozen=True)
class FunctionBatch:
    """A part of a global batch that a function has made."""

    inputs: Any
    targets: Any
    rows: Tensor

    def to(
        self, device: torch.device, dtype: torch.dtype, *, channels_last: bool = False
    ) -> "FunctionBatch":
        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            moved = leaf.to(device, dtype if leaf.is_floating_point() else None)
            if channels_last and moved.dim() == 4:
                moved = moved.to(memory_format=torch.channels_last)
            return moved

        return FunctionBatch(
            tree_map(move, self.inputs), tree_map(move, self.targets), self.rows.to(device)
        )


class FunctionFeed:
    """Global batches of ``batch_fn(step) -> (inputs, targets)``, cut by rows."""

    def __init__(self, batch_fn: Callable[[int], Any], steps: int) -> None:
        self._batch_fn = batch_fn
        self.steps_per_epoch = steps
        self._made: dict[int, tuple[Any, Any]] = {}

    def _batch(self, step: int) -> tuple[Any, Any]:
        if step not in self._made:
            # A batch_fn that draws from torch's own generator gives every rank the same batch.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(step)
                made = self._batch_fn(step)
            if not isinstance(made, tuple | list) or len(made) != 2:
                raise UsageError(
                    f"batch_fn({step}) returned a {type(made).__name__}",
                    hint="It must return (inputs, targets): the global batch of that step.",
                )
            self._made = {step: (made[0], made[1])}
        return self._made[step]

    @property
    def examples(self) -> int:
        return sum(self.batch_examples(step) for step in range(self.steps_per_epoch))

    @property
    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        for step in range(self.steps_per_epoch):
            for leaf in tree_flatten(self._batch(step))[0]:
                if isinstance(leaf, Tensor):
                    digest.update(bytes_of(leaf))
        return digest.hexdigest()

    def batch_examples(self, step: int) -> int:
        leaves = [
            leaf for leaf in tree_flatten(self._batch(step)[0])[0] if isinstance(leaf, Tensor)
        ]
        if not leaves or leaves[0].dim() == 0:
            raise UsageError(
                f"batch_fn({step}) has no tensor with a first dimension among its inputs",
                hint="Inputs are tensors [examples, …], alone or in a tuple.",
            )
        return int(leaves[0].shape[0])

    def read(self, step: int, start: int, stop: int) -> FunctionBatch:
        examples = self.batch_examples(step)

        def cut(leaf: Any) -> Any:
            rows = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == examples
            return leaf[start:stop] if rows else leaf

        inputs, targets = self._batch(step)
        if isinstance(inputs, list):
            inputs = tuple(inputs)
        return FunctionBatch(
            tree_map(cut, inputs), tree_map(cut, targets), torch.arange(start, stop)
        )

    def prefetch(self, step: int, start: int, stop: int) -> None:
        return

    def position(self, step: int) -> dict[str, int]:
        return {"epoch": 0, "position": step}


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's values as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


class VerifyingFeed:
    """Steps of another feed, some of them cut short; see the module."""

    def __init__(self, feed: Feed, steps: int, ranks: int, normalize_over: int | None) -> None:
        self._feed = feed
        self._normalize_over = normalize_over
        self.steps_per_epoch = steps
        self._plan = [self._choose(step, ranks) for step in range(steps)]

    def _choose(self, step: int, ranks: int) -> tuple[int, int]:
        """The other feed's step, and how many of its examples."""
        of_epoch = self._feed.steps_per_epoch
        chosen = of_epoch - 1 if step == 2 else step % of_epoch
        size = self._feed.batch_examples(chosen)
        if step == 1 and size % ranks == 0:
            smaller = range(size - 1, max(ranks, 2), -1)
            size = next((n for n in smaller if n % ranks and self._groups_hold_two(n)), size)
        # Nothing partial at the end: a batch that leaves a replica with an empty share, of two
        # examples at least, since batch norm refuses one.
        fewer = max(2, ranks - 1)
        if step == 2 and size == self._feed.batch_examples(0) and self._groups_hold_two(fewer):
            size = min(size, fewer)
        return chosen, size

    def _groups_hold_two(self, examples: int) -> bool:
        """Whether no statistics group is left with one example, which batch norm refuses."""
        size = self._normalize_over
        return size is None or size == 1 or examples % size != 1

    @property
    def examples(self) -> int:
        return sum(size for _, size in self._plan)

    @property
    def fingerprint(self) -> str:
        return self._feed.fingerprint

    def batch_examples(self, step: int) -> int:
        return self._plan[step][1]

    def read(self, step: int, start: int, stop: int) -> Any:
        return self._feed.read(self._plan[step][0], start, stop)

    def prefetch(self, step: int, start: int, stop: int) -> None:
        return

    def position(self, step: int) -> dict[str, int]:
        return {"epoch": 0, "position": step}
