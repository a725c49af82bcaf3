"""What asynchronous SGD can be combined with."""

import pytest

from shoal.errors import Refused, StrategyError
from shoal.strategy import Strategy


@pytest.mark.parametrize(
    "text",
    [
        "dp2/async:2",
        "dp4/async:1:servers=1",
        "dp2/async:3:compensate=0.5+bf16",
        "dp2/async:2:damp=1",
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
