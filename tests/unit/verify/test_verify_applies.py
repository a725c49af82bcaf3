"""What is another algorithm is refused, with the reason, before any rank starts."""

import pytest

from shoal.errors import Refused
from shoal.strategy import Strategy
from shoal.verify.applies import require_one_device


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dp2/async:2", ["order in which workers finish", "without async:2"]),
        ("dp2/solo", ["never meet", "no split to verify"]),
        ("dp2/local:8", ["weights of their own", "no split to verify"]),
        ("dp4/zero3:2/diloco:4", ["another algorithm", "verified: dp2/zero3."]),
        ("pp2.dp2/gossip:ring+bf16", ["verified: pp2+bf16."]),
        ("dp2/compress:bf16", ["approximation", "topk=100"]),
        ("dp2/compress:topk=99", ["approximation"]),
    ],
)
def test_another_algorithm_is_refused(text: str, parts: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        require_one_device(Strategy.parse(text))
    for part in parts:
        assert part in str(caught.value)


def test_the_same_algorithm_is_not() -> None:
    for text in ("single", "dp2", "pp2.dp2.tp2/zero1", "dp2/async:0", "dp2/compress:topk=100"):
        require_one_device(Strategy.parse(text))
