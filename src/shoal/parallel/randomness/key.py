"""`StepKey`: what the masks of the step in hand depend on, and which call of it comes next.

key = StepKey(seed=0)
key.begin(step, rows, rank)                   # before each forward pass, of a microbatch too
name = key.next_name("blocks.0", "dropout")   # "blocks.0#0", then "blocks.0#1"
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor, nn

from shoal.errors import Refused


class Moment(NamedTuple):
    """A place within a step, to come back to."""

    step: int
    rows: Tensor | None
    rank: int
    calls: dict[str, int]
    active: bool


@dataclass
class StepKey:
    """What the masks of the step in hand depend on; shared by all that drops in a replica."""

    seed: int
    step: int = 0
    rows: Tensor | None = None
    rank: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # of modules with several names
    replays: bool = False
    # Whether the model drops elements outside its layers: None until a training pass has shown it.
    intercepts: bool | None = None
    # Whether the rows of a step are not all in one forward pass: on several ranks, or one by one.
    splits: bool = False
    active: bool = False

    def begin(self, step: int, rows: Tensor, rank: int) -> None:
        """``rows``: positions of the local rows in the global batch."""
        self.step, self.rows, self.rank = step, rows, rank
        self.calls = {}
        torch.manual_seed(hashed(self.seed, step, f"rank {rank}") & 0x7FFF_FFFF_FFFF_FFFF)

    def know(self, model: nn.Module) -> None:
        """Learn the paths of the model's modules; one with several goes by the first."""
        self.paths = {id(module): path for path, module in model.named_modules()}
        every = list(model.named_modules(remove_duplicate=False))
        several = {self.paths[id(m)] for path, m in every if self.paths[id(m)] != path}
        first = {path: self.paths[id(module)] for path, module in every}
        self.aliases = {path: name for path, name in first.items() if name in several}

    def next_name(self, path: str | None, kind: str) -> str:
        """The name of the next call of this kind by the module at `path` in this step.

        Raises `Refused` where a block that the model itself runs again in the backward pass has
        called it more than once: which of the calls it is cannot be known.
        """
        place = call_place(path or "", kind)
        number = self.calls.get(place, 0)
        if self.in_backward:
            if path is None or number != 1:
                raise _refused_replay(path, kind)
            return f"{place}0"
        self.calls[place] = number + 1
        return f"{place}{number}"

    def skip(self, path: str | None, kind: str) -> None:
        """Count a call that drops nothing."""
        if not self.in_backward:
            place = call_place(path or "", kind)
            self.calls[place] = self.calls.get(place, 0) + 1

    @property
    def in_backward(self) -> bool:
        """Whether a backward pass is running, and it is not a block that Shoal runs again."""
        return not self.replays and torch._C._current_graph_task_id() >= 0

    def moment(self) -> Moment:
        """Where the step is now, for `replaying`."""
        return Moment(self.step, self.rows, self.rank, dict(self.calls), self.active)

    @contextlib.contextmanager
    def replaying(self, moment: Moment) -> Iterator[None]:
        """Inside, the step is at `moment`: a block runs again and needs its masks again."""
        kept, was = self.moment(), self.replays
        self._move_to(moment, replays=True)
        try:
            yield
        finally:
            self._move_to(kept, replays=was)

    def _move_to(self, moment: Moment, *, replays: bool) -> None:
        self.step, self.rows, self.rank = moment.step, moment.rows, moment.rank
        self.calls, self.active = dict(moment.calls), moment.active
        self.replays = replays


def call_place(path: str, kind: str) -> str:
    """The name of a call of `kind` at `path`, without its number."""
    return f"{path}#" if kind == "dropout" else f"{path}#{kind} "


def hashed(seed: int, step: int, name: str) -> int:
    """The key of one call's masks: 64 bits, signed."""
    return signed(xxhash.xxh3_64_intdigest(f"{seed}/{step}/{name}".encode()))


def signed(value: int) -> int:
    """The int64 of the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _refused_replay(path: str | None, kind: str) -> Refused:
    return Refused(
        f"{path or 'the model'} runs again in the backward pass ({kind}) by a checkpoint of the "
        "model's own, and which of its calls is meant cannot be known: its masks would differ",
        hint="Take torch.utils.checkpoint out of the model and train with +recompute; or let the "
        "checkpointed part be a module of its own, which drops once.",
    )
