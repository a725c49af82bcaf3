"""A pipeline schedule as a table (rank × time of actions): made, validated and timed here.

    1f1b, 3 ranks, 4 microbatches, a backward as long as two forwards

    rank 0   F0 F1 F2 .  .  .  .  B0 -- F3 B1 -- B2 -- .  .  B3 --
    rank 1   .  F0 F1 .  .  B0 -- F2 B1 -- F3 B2 -- .  .  B3 -- .
    rank 2   .  .  F0 B0 -- F1 B1 -- F2 B2 -- F3 B3 -- .  .  .  .

    table = make("1f1b", ranks=3, microbatches=4)
    table.validate()
    table.simulate(forward=1, backward=2).bubble             # (3 − 1) ÷ (4 + 3 − 1)

The planner simulates the same table that the runtime runs, so that the two cannot disagree. An
action is F (forward), B (the whole backward pass), or its two halves: I (gradients of the stage's
inputs, which the stage before waits for) and W (gradients of its weights, for which nobody does,
so that they fill what would be idle time).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from shoal.errors import Refused

Kind: TypeAlias = Literal["F", "B", "I", "W"]
Method: TypeAlias = Literal["gpipe", "1f1b", "interleaved", "zb", "zbv"]
Times: TypeAlias = float | Sequence[float]

METHODS: tuple[Method, ...] = ("gpipe", "1f1b", "interleaved", "zb", "zbv")


class Action(NamedTuple):
    """One piece of work of one stage on one microbatch, both counted from 0."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch} of stage {self.stage}"


@dataclass(frozen=True)
class Timing:
    """What simulating a table gives; times in the unit that was given.

    ``busy``: of each rank. ``spans``: (start, end) of every action. ``bubble``: the idle share of
    ranks × makespan.
    """

    makespan: float
    busy: tuple[float, ...]
    spans: dict[Action, tuple[float, float]] = field(repr=False)

    @property
    def bubble(self) -> float:
        """Idle time ÷ all time, 0 to 1."""
        whole = len(self.busy) * self.makespan
        return (whole - sum(self.busy)) / whole if whole else 0.0


@dataclass(frozen=True)
class Table:
    """Which actions each rank does, in their order. Made by :func:`make`.

    ``rows[rank]`` are that rank's actions. Stages are placed on the ranks round and round, or for
    ``zbv`` there and back: rank 0 then has the first stage and the last.
    """

    method: Method
    microbatches: int
    chunks: int
    rows: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.rows)

    @property
    def stages(self) -> int:
        """Stages in all: ranks × chunks."""
        return self.ranks * self.chunks

    def rank_of(self, stage: int) -> int:
        """The rank that runs `stage`."""
        return _rank_of(self.method, stage, self.ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages of `rank`, ascending."""
        return tuple(s for s in range(self.stages) if self.rank_of(s) == rank)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether backward passes are in two halves, I and W."""
        return any(action.kind == "I" for row in self.rows for action in row)

    def needs(self, action: Action) -> tuple[Action, ...]:
        """The actions that must be done before `action`."""
        kind, stage, microbatch = action
        if kind == "F":
            return (Action("F", stage - 1, microbatch),) if stage else ()
        if kind == "W":
            return (Action("I", stage, microbatch),)
        own = Action("F", stage, microbatch)
        if stage == self.stages - 1:
            return (own,)
        return own, Action(kind, stage + 1, microbatch)

    def validate(self) -> None:
        """Check that every action is there once, on its rank, and that no rank waits for ever.

        Ranks do their actions in order, wait for what they need, and never for what they send.
        Raises ValueError that names the action.
        """
        self._check_complete()
        for action in self._in_time():
            if action is None:
                raise ValueError(f"{self.method}: {self._stuck()}")

    def simulate(
        self, forward: Times, backward: Times, weight: Times | None = None, transfer: float = 0
    ) -> Timing:
        """Time the table with these durations of each stage (or one number for all).

        ``backward`` is the whole backward pass, ``weight`` that part of it that W does (half, if
        not given); ``transfer`` passes between the end of an action and the beginning of one on
        another rank that needs it.
        """
        times = self._times(forward, backward, weight)
        free = [0.0] * self.ranks
        busy = [0.0] * self.ranks
        spans: dict[Action, tuple[float, float]] = {}
        for action in self._in_time():
            if action is None:
                raise ValueError(f"{self.method}: {self._stuck()}")
            rank = self.rank_of(action.stage)
            begin = free[rank]
            for needed in self.needs(action):
                far = self.rank_of(needed.stage) != rank
                begin = max(begin, spans[needed][1] + (transfer if far else 0))
            takes = times[action.kind][action.stage]
            free[rank] = begin + takes
            busy[rank] += takes
            spans[action] = (begin, free[rank])
        return Timing(max(free, default=0.0), tuple(busy), spans)

    def _times(
        self, forward: Times, backward: Times, weight: Times | None
    ) -> dict[Kind, list[float]]:
        whole = self._of_each(backward)
        weights = [each / 2 for each in whole] if weight is None else self._of_each(weight)
        inputs = [b - w for b, w in zip(whole, weights, strict=True)]
        return {"F": self._of_each(forward), "B": whole, "I": inputs, "W": weights}

    def _of_each(self, times: Times) -> list[float]:
        """One duration for each stage."""
        if not isinstance(times, Sequence):
            return [times] * self.stages
        if len(times) != self.stages:
            raise ValueError(f"{len(times)} durations for {self.stages} stages")
        return list(times)

    def _in_time(self) -> Iterator[Action | None]:
        """All actions, each after those that it needs; None at the end if some cannot be done."""
        done: set[Action] = set()
        place = [0] * self.ranks
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(self.rows):
                while place[rank] < len(row) and done.issuperset(self.needs(row[place[rank]])):
                    action = row[place[rank]]
                    done.add(action)
                    place[rank] += 1
                    moved = True
                    yield action
        if any(at < len(row) for at, row in zip(place, self.rows, strict=True)):
            yield None

    def _stuck(self) -> str:
        """Which ranks wait for what, in words."""
        done = {action for action in self._in_time() if action is not None}
        waiting = []
        for rank, row in enumerate(self.rows):
            left = [action for action in row if action not in done]
            if left:
                missing = next(each for each in self.needs(left[0]) if each not in done)
                waiting.append(f"rank {rank} cannot do {left[0]}, which needs {missing}")
        return "; ".join(waiting)

    def _check_complete(self) -> None:
        seen: set[Action] = set()
        for rank, row in enumerate(self.rows):
            for action in row:
                if action in seen:
                    raise ValueError(f"{self.method}: {action} is there twice")
                if self.rank_of(action.stage) != rank:
                    raise ValueError(f"{self.method}: {action} is on rank {rank}")
                seen.add(action)
        halves: tuple[Kind, ...] = ("F", "I", "W") if self.splits_backward else ("F", "B")
        wanted = {
            Action(kind, stage, microbatch)
            for kind in halves
            for stage in range(self.stages)
            for microbatch in range(self.microbatches)
        }
        for action in sorted(seen ^ wanted):
            what = "is missing" if action in wanted else "has no place in it"
            raise ValueError(f"{self.method}: {action} {what}")


def make(method: str, ranks: int, microbatches: int, chunks: int | None = None) -> Table:
    """The table of `method` for any number of ranks and microbatches.

    ``chunks``: stages on each rank; 1 for ``gpipe`` and ``1f1b``, 2 for ``zbv``, 2 or more for
    ``interleaved``, any for ``zb``. Raises `Refused` for others.

    Sources: GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019), interleaved 1F1B (Narayanan et
    al. 2021, §2.2, with rounds of uneven sizes where they do not divide), zero bubble and ZB-V (Qi
    et al. 2024, §2 and §6, the schedules of equal times).
    """
    if method not in METHODS:
        raise Refused(f"no pipeline schedule {method!r}", hint=f"There are {', '.join(METHODS)}.")
    for name, number in (("ranks", ranks), ("microbatches", microbatches)):
        if number < 1:
            raise Refused(f"{method}: {number} {name}, and one at least is needed")
    wanted: dict[str, int] = {"gpipe": 1, "1f1b": 1, "zbv": 2}
    chunks = wanted.get(method, 2 if method == "interleaved" else 1) if chunks is None else chunks
    if chunks != wanted.get(method, chunks) or chunks < 1:
        raise Refused(
            f"{method}: {chunks} stages on each rank; it has {wanted.get(method, '1 or more')}",
            hint="interleaved:V takes any number V of stages on each rank.",
        )
    size = _Size(ranks, microbatches, chunks)
    makers = {
        "gpipe": _gpipe, "1f1b": _one_f_one_b, "interleaved": _interleaved,
        "zb": _zero_bubble, "zbv": _zero_bubble_v,
    }  # fmt: skip
    rows = tuple(tuple(makers[method](size, rank)) for rank in range(ranks))
    return Table(method, microbatches, chunks, rows)


def _rank_of(method: str, stage: int, ranks: int) -> int:
    chunk, place = divmod(stage, ranks)
    return ranks - 1 - place if method == "zbv" and chunk % 2 else place


@dataclass(frozen=True)
class _Size:
    ranks: int
    microbatches: int
    chunks: int

    @property
    def rounds(self) -> list[range]:
        """Microbatches go through a rank's chunks in rounds of about as many as there are ranks."""
        count = max(1, self.microbatches // self.ranks)
        each, more = divmod(self.microbatches, count)
        cuts = [0]
        for number in range(count):
            cuts.append(cuts[-1] + each + (number < more))
        return [range(a, b) for a, b in itertools.pairwise(cuts)]

    def in_rounds(self, rank: int, *, backwards: bool) -> list[tuple[int, int]]:
        """(stage, microbatch) in the order of a rank's forwards, or of its backwards."""
        chunks = range(self.chunks)
        return [
            (chunk * self.ranks + rank, microbatch)
            for each in self.rounds
            for chunk in (reversed(chunks) if backwards else chunks)
            for microbatch in each
        ]


def _gpipe(size: _Size, rank: int) -> list[Action]:
    every = range(size.microbatches)
    return [*(Action("F", rank, m) for m in every), *(Action("B", rank, m) for m in every)]


def _one_f_one_b(size: _Size, rank: int) -> list[Action]:
    forwards = [Action("F", rank, m) for m in range(size.microbatches)]
    backwards = [Action("B", rank, m) for m in range(size.microbatches)]
    return _steady(forwards, backwards, size.ranks - 1 - rank)


def _interleaved(size: _Size, rank: int) -> list[Action]:
    warmup = (size.chunks - 1) * len(size.rounds[0]) + 2 * (size.ranks - 1 - rank)
    forwards = [Action("F", *each) for each in size.in_rounds(rank, backwards=False)]
    backwards = [Action("B", *each) for each in size.in_rounds(rank, backwards=True)]
    return _steady(forwards, backwards, warmup)


def _steady(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then one forward and one backward in turn, then backwards alone."""
    warmup = min(warmup, len(forwards))
    actions = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        actions += (forward, backward)
    return actions + backwards[len(forwards) - warmup :]


def _zero_bubble(size: _Size, rank: int) -> list[Action]:
    """As interleaved, with half the warm-up; W stays `rank` actions behind I."""
    warmup = (size.chunks - 1) * len(size.rounds[0]) + size.ranks - 1 - rank
    forwards = [Action("F", *each) for each in size.in_rounds(rank, backwards=False)]
    backwards = size.in_rounds(rank, backwards=True)
    inputs = [Action("I", *each) for each in backwards]
    weights = iter([Action("W", *each) for each in backwards])
    actions, seen = [], 0
    for action in _steady(forwards, inputs, warmup):
        actions.append(action)
        if action.kind == "I":
            if seen >= rank:
                actions.append(next(weights))
            seen += 1
    return [*actions, *weights]


def _zero_bubble_v(size: _Size, rank: int) -> list[Action]:
    """Made for 2·ranks − 1 microbatches at least; those that there are not are left out."""
    ranks = size.ranks
    count = max(2 * ranks - 1, size.microbatches)
    row = _Row(down=rank, up=2 * ranks - 1 - rank)
    row.add(["F down"] * (2 * (ranks - rank) - 1))
    row.add(["F up", "F down"] * rank)
    row.add(["F up", "I up", "W up"] * (ranks - rank))
    while row.done["F up"] < row.done["F down"] or row.done["F down"] < count:
        if row.done["F down"] < count:
            row.add(["F down"])
        row.add(["I down", "W down", "F up", "I up", "W up"])
    row.add(["I down", "I up"] * rank)
    row.add(["I down", "W down"] * (ranks - rank))
    for way in ("up", "down"):
        row.add([f"W {way}"] * (row.done[f"I {way}"] - row.done[f"W {way}"]))
    return [action for action in row.actions if action.microbatch < size.microbatches]


class _Row:
    """A row of the V in the making: what each chunk does, one microbatch after the other."""

    def __init__(self, down: int, up: int) -> None:
        self._stage = {"down": down, "up": up}
        self.done = {f"{kind} {way}": 0 for kind in "FIW" for way in ("down", "up")}
        self.actions: list[Action] = []

    def add(self, steps: list[str]) -> None:
        for step in steps:
            kind, way = step.split()
            self.actions.append(Action(kind, self._stage[way], self.done[step]))  # type: ignore[arg-type]
            self.done[step] += 1
