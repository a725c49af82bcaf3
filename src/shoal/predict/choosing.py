"""From several members one model: the best of them, their average, or a soup of some.

    best            highest accuracy on the selection tenth (among equals, lowest loss)
    mean            (θ_0 + … + θ_{n−1}) / n
    greedy-soup     by accuracy, best first: a member stays if the average is no worse with it
    matched-mean    the mean, once every member's units are in the order of the first's

    made = make_one("greedy-soup", Bench(members))
    made.state                                   # statistics estimated anew

Soups: Wortsman et al. 2022 (arXiv 2203.05482), recipe 1. Matching: see `matching`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from shoal.errors import UsageError
from shoal.predict.bench import Bench
from shoal.predict.matching import match
from shoal.predict.merging import average
from shoal.predict.permutations import State, spaces_of

How = Literal["best", "mean", "greedy-soup", "matched-mean", "ensemble"]
HOWS: tuple[How, ...] = get_args(How)
MERGING: tuple[How, ...] = ("mean", "greedy-soup", "matched-mean")
BARRIER = 0.05  # nats above the members' mean loss, from which an average crosses a barrier
POINTS = (0.25, 0.5, 0.75)  # between two members; at the ends there is no barrier


@dataclass(frozen=True)
class Made:
    """One model: a member's number, or a state made of some members; and what to know of it."""

    used: tuple[int, ...]
    state: dict[str, Tensor] | None = None
    notes: tuple[str, ...] = ()


def check_how(how: str, members: int) -> How:
    """Raise `UsageError` for a way that does not exist, or needs more models than there are."""
    known = next((each for each in HOWS if each == how), None)
    if known is None:
        raise UsageError(f"--how {how}: it must be one of {', '.join(HOWS)}")
    if known in MERGING and members < 2:
        raise UsageError(
            f"--how {how} merges several models, and there is one",
            hint="Leave --how out, or give several runs or one of solo (dp4/solo).",
        )
    return known


def make_one(how: How, bench: Bench) -> Made:
    """The one model of any way but ensemble."""
    if how == "best":
        return Made((best(bench),), notes=_selected_on_seen(bench))
    states = bench.states()
    if how == "greedy-soup":
        used, state = greedy_soup(bench, states)
        return Made(used, state, _selected_on_seen(bench))
    if how == "matched-mean":
        states = matched(bench, states)
    state = bench.estimated(average(states))
    return Made(tuple(range(len(bench))), state, _crossed(how, bench, state))


def by_rank(bench: Bench) -> list[int]:
    """The members, best on the selection tenth first."""
    return sorted(range(len(bench)), key=lambda n: bench.scores(n).rank, reverse=True)


def best(bench: Bench) -> int:
    """The number of the best member on the selection tenth."""
    return by_rank(bench)[0]


def greedy_soup(bench: Bench, states: Sequence[State]) -> tuple[tuple[int, ...], dict[str, Tensor]]:
    """The members of the soup, as they were added, and its weights.

    On the selection tenth it is never less accurate than the best member.
    """
    first, *others = by_rank(bench)
    used, soup, reached = [first], dict(states[first]), bench.scores(first).accuracy
    for number in others:
        tried = bench.estimated(average([states[n] for n in [*used, number]]))
        accuracy = bench.scores_of(tried).accuracy
        if accuracy >= reached:
            used, soup, reached = [*used, number], tried, accuracy
    return tuple(used), soup


def matched(bench: Bench, states: Sequence[State]) -> list[State]:
    """The states, each with its units in the order of the first's."""
    feed = bench.setting(0).workload.feed
    rows = min(4, feed.batch_examples(0))
    inputs = feed.read(0, 0, rows).inputs
    model = bench.setting(0).workload.build_model()
    spaces = spaces_of(model, inputs, rows)
    parameters = {name for name, _ in model.named_parameters()}
    first = states[0]
    return [first, *(match(first, each, spaces, parameters) for each in states[1:])]


def barrier(bench: Bench, one: State, other: State, max_examples: int = 2048) -> float:
    """How far the loss rises above the straight line between two networks' losses, in nats.

    max over t of loss((1 − t) θ_0 + t θ_1) − (1 − t) loss(θ_0) − t loss(θ_1), at t = 0, ¼, ½, ¾, 1;
    on the selection tenth, statistics estimated at each point (Frankle et al. 2020, arXiv
    1912.05671; Jordan et al. 2022, arXiv 2211.08403, for the statistics).
    """
    ends = [bench.scores_of(state).loss for state in (one, other)]
    highest = 0.0
    for t in POINTS:
        point = bench.estimated(average([one, other], (1 - t, t)), max_examples)
        line = (1 - t) * ends[0] + t * ends[1]
        highest = max(highest, bench.scores_of(point).loss - line)
    return highest


def _crossed(how: How, bench: Bench, state: State) -> tuple[str, ...]:
    """A warning where the average is much worse than what it is the average of."""
    members = [bench.scores(number).loss for number in range(len(bench))]
    rise = bench.scores_of(state).loss - sum(members) / len(members)
    if rise <= BARRIER:
        return ()
    return (
        f"the average crosses a barrier of the loss: on the selection tenth its loss is {rise:.3g} "
        f"nats above the mean of its members'. Members that started apart, or went far apart, do "
        "not lie in one basin: predict with --how ensemble or best"
        + ("" if how == "matched-mean" else ", or try matched-mean"),
    )


def _selected_on_seen(bench: Bench) -> tuple[str, ...]:
    """Where the selection tenth was trained on by some member."""
    seen = [member.name for member in bench.members if not member.solo]
    if not seen or len(bench) == 1:
        return ()
    return (
        f"{', '.join(seen[:3])} {'was' if len(seen) == 1 else 'were'} trained on the tenth of the "
        "training data that models are chosen on (only solo keeps it back): the choice favours "
        "what has overfitted",
    )
