"""What asynchronous SGD can be combined with."""

import pytest

from shoal.errors import Refused, StrategyError
from shoal.strategy import Async, Strategy


@pytest.mark.parametrize(
    "text",
    [
        "dp2/async:2",
        "dp4/async:1:servers=1",
        "dp2/async:3:compensate=0.5+bf16",
        "dp2/async:2:damp=1",
        "dp2/async:2:copies=1",
        "dp4/async:2:servers=2:copies=1",
        "single/async:2",
        "dp2/async:2/mb:2",
    ],
)
def test_it_runs(text: str) -> None:
    Strategy.parse(text).check_runnable(batch_size=8, ranks_available=4)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("pp2.dp2/async:2", "async:2 with pp2"),
        ("dp2.tp2/async:2", "async:2 with tp2"),
        ("dp4/zero3:2/async:2", "async:2 with zero3:2"),
    ],
)
def test_it_does_not_run_yet_over_replicas_of_several_ranks(text: str, part: str) -> None:
    with pytest.raises(Refused, match=part):
        Strategy.parse(text).check_runnable(batch_size=64)


def test_a_bound_below_zero_is_refused() -> None:
    with pytest.raises(StrategyError, match="0 or more"):
        Strategy.parse("dp2/async:-1")


@pytest.mark.parametrize(
    ("text", "said", "near"),
    [
        ("dp3/async:2:servers=1:copies=1", "there is one", "async:2:servers=1"),
        ("dp4/async:2:copies=2", "one copy is all", "async:2:copies=1"),
    ],
)
def test_a_copy_needs_another_owner(text: str, said: str, near: str) -> None:
    with pytest.raises(Refused, match=said) as caught:
        Strategy.parse(text)
    assert caught.value.hint == f"Nearest that works: {near}."


def test_ranks_that_may_die() -> None:
    def expendable(text: str) -> tuple[int, ...]:
        strategy = Strategy.parse(text)
        assert isinstance(strategy.agreement, Async)
        return strategy.agreement.expendable(strategy.world_size)

    assert expendable("dp3/async:2") == ()
    assert expendable("dp4/async:2:servers=2") == (2, 3)
    assert expendable("dp3/async:2:copies=1") == (1, 2)
