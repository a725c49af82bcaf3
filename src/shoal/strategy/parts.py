"""The parts of a strategy beside axes and agreement: what is sharded, compressed, in which order.

str(Zero(3, group=4))                     # 'zero3:4'
str(Compress("powersgd", 4))              # 'compress:powersgd=4'
"""

from dataclasses import dataclass
from typing import Self

from shoal.errors import Refused, StrategyError
from shoal.strategy.kinds import Kind, Real, Whole, Word

METHODS = Word(("fp16", "bf16", "powersgd", "topk"), "compress: the method")
AMOUNTS: dict[str, Kind] = {
    "powersgd": Whole(1, "compress:powersgd=R: R, the rank", "compress:powersgd={}"),
    "topk": Real(
        0, 100, "compress:topk=P: P, the percent that is sent", "compress:topk={}", inclusive=False
    ),
}
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb", "zbv")
CHUNKS = Whole(1, "interleaved:V: V, the chunks of a rank", "interleaved:{}")
GROUP = Whole(2, "zero3:G: G, the ranks in a shard group", "zero3:{}")


@dataclass(frozen=True)
class Zero:
    """ZeRO: optimizer state (1), gradients too (2), parameters too (3) cut over a shard group.

    ``group``: ranks in a shard group, None for the whole dp axis (Rajbhandari et al. 2020, §5).
    """

    stage: int
    group: int | None = None

    def __post_init__(self) -> None:
        """Raises Refused for another stage, or a group that shards nothing."""
        if self.stage not in (1, 2, 3):
            near = 1 if self.stage < 1 else 3
            raise Refused(
                f"ZeRO has the stages 1, 2 and 3; given {self.stage}",
                hint=f"Nearest that works: zero{near}.",
            )
        if self.group is None:
            return
        if self.stage != 3:
            raise Refused(
                f"only zero3 takes a group: zero{self.stage} shards over all of dp",
                hint=f"Nearest that works: zero{self.stage}, or zero3:{self.group}.",
            )
        GROUP.check(self.group)

    def __str__(self) -> str:
        return f"zero{self.stage}" + ("" if self.group is None else f":{self.group}")


@dataclass(frozen=True)
class Compress:
    """What replicas send is made smaller.

    Methods: `fp16`, `bf16`; `powersgd` of rank ``amount`` (Vogels et al. 2019); `topk`, the
    ``amount`` percent of entries that are largest, with error feedback (Stich et al. 2018).
    """

    method: str
    amount: float | None = None

    def __post_init__(self) -> None:
        """Raises StrategyError or Refused for another method or amount."""
        METHODS.check(self.method)
        kind = AMOUNTS.get(self.method)
        if kind is None and self.amount is not None:
            raise StrategyError(f"compress:{self.method} takes no number; given {self.amount!r}")
        if kind is not None:
            kind.check(self.amount)

    def __str__(self) -> str:
        kind = AMOUNTS.get(self.method)
        amount = "" if kind is None else f"={kind.write(self.amount)}"
        return f"compress:{self.method}{amount}"

    @classmethod
    def read(cls, pieces: list[str]) -> Self:
        """`bf16` or `powersgd=4`. Raises StrategyError."""
        if len(pieces) != 1:
            raise StrategyError(f"compress needs one method: {METHODS.allowed}")
        method, equals, amount = pieces[0].partition("=")
        METHODS.check(method)
        kind = AMOUNTS.get(method)
        if (kind is not None) != bool(equals):
            need = "no number" if kind is None else f"a number, as in compress:{method}=4"
            raise StrategyError(f"compress:{method} takes {need}; given {pieces[0]!r}")
        return cls(method, None if kind is None else kind.read(amount))


@dataclass(frozen=True)
class Schedule:
    """The order of a pipeline's work; ``chunks``: pieces of the model that a rank holds.

    `gpipe` (Huang et al. 2019), `1f1b` and `interleaved` (Narayanan et al. 2021, §2.2), `zb` and
    `zbv` (Qi et al. 2024). The number of chunks is a choice for `interleaved` only.
    """

    method: str
    chunks: int | None = None

    def __post_init__(self) -> None:
        """Raises StrategyError or Refused for another method or number of chunks."""
        Word(SCHEDULES, "the schedule").check(self.method)
        if self.method == "interleaved":
            if self.chunks is None:
                raise StrategyError("interleaved needs V, as in interleaved:2")
            CHUNKS.check(self.chunks)
        elif self.chunks is not None:
            raise StrategyError(f"{self.method} takes no number; given {self.chunks!r}")

    def __str__(self) -> str:
        return self.method + ("" if self.chunks is None else f":{self.chunks}")
