"""A model of the ticks and slots of `core.c`, small enough to look at every order of events.

    rank, tick t:  write my slot of t+1 (begin) · read the others' slots of t · write (end) ·
                   arrive at t+1 · look for sleepers, wake them · wait for each of the others

    search(Protocol(ranks=3, ticks=3))            # None, or what went wrong and how
    search(Protocol(ranks=2, ticks=3, slots=1))   # "rank 1 reads …"

A step is one access to shared memory, or one system call, of one rank. The search goes through all
orders of the ranks' steps (that memory is ordered as the program says is what `core.c` has its
release, acquire and sequentially consistent accesses for, and what ThreadSanitizer looks at). There
are no time slices here: a wake-up that is missed is a rank that sleeps for ever.
"""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

TORN = -1


@dataclass(frozen=True)
class Protocol:
    """The protocol, or one with a bug in it."""

    ranks: int
    ticks: int
    slots: int = 2
    arrives_before_it_has_written: bool = False
    looks_for_sleepers_before_arriving: bool = False
    waits_for_the_next_rank_only: bool = False
    sleeps_whatever_it_has_seen: bool = False


class Rank(NamedTuple):
    """Where a rank is: `doing` what, in which tick, with which of the others."""

    doing: str = "begin"
    tick: int = 0
    other: int = 0
    seen: int = 0


class State(NamedTuple):
    ranks: tuple[Rank, ...]
    arrived: tuple[int, ...]
    sleepers: tuple[int, ...]
    slots: tuple[int, ...]  # which tick's values each holds


class Wrong(Exception):
    """A rank has read what it should not."""


def changed(values: tuple[int, ...], place: int, value: int) -> tuple[int, ...]:
    return (*values[:place], value, *values[place + 1 :])


class Machine:
    """All steps that can be taken from a state."""

    def __init__(self, protocol: Protocol) -> None:
        self.p = protocol

    def first(self) -> State:
        n = self.p.ranks
        return State((Rank(),) * n, (0,) * n, (0,) * n, (0,) * (n * self.p.slots))

    def after(self, state: State, r: int) -> State | None:
        """The state after the next step of rank `r`; None if it sleeps or is done."""
        rank = state.ranks[r]
        if rank.doing in ("asleep", "done"):
            return None
        step = getattr(self, "_" + rank.doing.replace(" ", "_"))
        result: State = step(state, r, rank)
        return result

    def _to(self, state: State, r: int, rank: Rank) -> State:
        return state._replace(ranks=(*state.ranks[:r], rank, *state.ranks[r + 1 :]))

    def _slot(self, r: int, tick: int) -> int:
        return r * self.p.slots + tick % self.p.slots

    def _next_other(self, rank: Rank, doing: str, then: str) -> Rank:
        """Go on with the next of the others, or with what comes then."""
        other = rank.other + 1
        if other < self.p.ranks:
            return rank._replace(doing=doing, other=other)
        return rank._replace(doing=then, other=1)

    def _who(self, rank: Rank, r: int) -> int:
        return (r + rank.other) % self.p.ranks

    def _begin(self, state: State, r: int, rank: Rank) -> State:
        slots = changed(state.slots, self._slot(r, rank.tick + 1), TORN)
        doing = "read" if rank.tick else "end"
        return self._to(state._replace(slots=slots), r, rank._replace(doing=doing, other=1))

    def _read(self, state: State, r: int, rank: Rank) -> State:
        self._must_be_whole(state, r, rank)
        return self._to(state, r, rank._replace(doing="still read"))

    def _still_read(self, state: State, r: int, rank: Rank) -> State:
        self._must_be_whole(state, r, rank)
        return self._to(state, r, self._next_other(rank, "read", "end"))

    def _must_be_whole(self, state: State, r: int, rank: Rank) -> None:
        q = self._who(rank, r)
        found = state.slots[self._slot(q, rank.tick)]
        if found != rank.tick:
            what = "half-written values" if found == TORN else f"values of tick {found}"
            raise Wrong(f"rank {r} reads {what} of rank {q} in tick {rank.tick}")

    def _end(self, state: State, r: int, rank: Rank) -> State:
        if rank.tick == self.p.ticks:
            return self._to(state, r, rank._replace(doing="done"))
        tick = rank.tick + 1
        if self.p.arrives_before_it_has_written:
            state = state._replace(arrived=changed(state.arrived, r, tick))
            return self._to(state, r, rank._replace(doing="late", tick=tick))
        state = state._replace(slots=changed(state.slots, self._slot(r, tick), tick))
        doing = "look" if self.p.looks_for_sleepers_before_arriving else "arrive"
        return self._to(state, r, rank._replace(doing=doing, tick=tick))

    def _late(self, state: State, r: int, rank: Rank) -> State:
        state = state._replace(slots=changed(state.slots, self._slot(r, rank.tick), rank.tick))
        return self._to(state, r, rank._replace(doing="look"))

    def _arrive(self, state: State, r: int, rank: Rank) -> State:
        state = state._replace(arrived=changed(state.arrived, r, rank.tick))
        if self.p.looks_for_sleepers_before_arriving:
            return self._to(
                state, r, rank._replace(doing="wake" if rank.seen else "check", other=1)
            )
        return self._to(state, r, rank._replace(doing="look"))

    def _look(self, state: State, r: int, rank: Rank) -> State:
        some = state.sleepers[r]
        if self.p.looks_for_sleepers_before_arriving:
            return self._to(state, r, rank._replace(doing="arrive", seen=some))
        return self._to(state, r, rank._replace(doing="wake" if some else "check", other=1))

    def _wake(self, state: State, r: int, rank: Rank) -> State:
        woken = tuple(
            each._replace(doing="leave") if each.doing == "asleep" and self._who(each, q) == r
            else each
            for q, each in enumerate(state.ranks)
        )  # fmt: skip
        return self._to(state._replace(ranks=woken), r, rank._replace(doing="check", other=1))

    def _check(self, state: State, r: int, rank: Rank) -> State:
        """Has this one arrived? Then to the next, or to the reading; else to bed."""
        if state.arrived[self._who(rank, r)] < rank.tick:
            return self._to(state, r, rank._replace(doing="announce"))
        if self.p.waits_for_the_next_rank_only:
            return self._to(state, r, rank._replace(doing="begin", other=1, seen=0))
        return self._to(state, r, self._next_other(rank, "check", "begin")._replace(seen=0))

    def _announce(self, state: State, r: int, rank: Rank) -> State:
        q = self._who(rank, r)
        state = state._replace(sleepers=changed(state.sleepers, q, state.sleepers[q] + 1))
        return self._to(state, r, rank._replace(doing="look again"))

    def _look_again(self, state: State, r: int, rank: Rank) -> State:
        seen = state.arrived[self._who(rank, r)]
        doing = "leave" if seen >= rank.tick else "sleep"
        return self._to(state, r, rank._replace(doing=doing, seen=seen))

    def _sleep(self, state: State, r: int, rank: Rank) -> State:
        """The kernel compares before it lets anyone sleep, in one step."""
        same = state.arrived[self._who(rank, r)] == rank.seen
        stays = same or self.p.sleeps_whatever_it_has_seen
        return self._to(state, r, rank._replace(doing="asleep" if stays else "leave", seen=0))

    def _leave(self, state: State, r: int, rank: Rank) -> State:
        q = self._who(rank, r)
        state = state._replace(sleepers=changed(state.sleepers, q, state.sleepers[q] - 1))
        return self._to(state, r, rank._replace(doing="check", seen=0))


def search(protocol: Protocol) -> tuple[str | None, int]:
    """What can go wrong, None if nothing can; and how many states there are."""
    machine = Machine(protocol)
    start = machine.first()
    known, waiting = {start}, deque([start])
    while waiting:
        state = waiting.popleft()
        moved = False
        for r in range(protocol.ranks):
            try:
                following = machine.after(state, r)
            except Wrong as wrong:
                return str(wrong), len(known)
            if following is None:
                continue
            moved = True
            if following not in known:
                known.add(following)
                waiting.append(following)
        if not moved and any(rank.doing != "done" for rank in state.ranks):
            asleep = [r for r, rank in enumerate(state.ranks) if rank.doing == "asleep"]
            return f"ranks {asleep} sleep for ever", len(known)
    return None, len(known)
