"""`Strategy`: how one model's training is split over ranks, as one frozen, printable value.

    strategy = Strategy.parse("pp2.dp2.tp2/zero1+bf16")
    strategy.world_size, strategy.dp, str(strategy.zero)     # 8, 2, 'zero1'
    strategy.resolved()     # 'pp2.dp2.tp2/zero1/sync/mb:8/1f1b+bf16'

`parse(str(x)) == x`; `str` is canonical: `dp1` is `single`, defaults are left out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shoal.errors import Refused, StrategyError
from shoal.strategy import checks, grammar
from shoal.strategy.agreements import Agreement, Async, Easgd, Solo, Sync
from shoal.strategy.parts import Compress, Schedule, Zero

EVERY_STEP = Sync()
RUNS_NOW = (
    "ppN, dpN and tpN in any product, with /zero1, /zero2, /zero3[:G], /mb:M, /sp, /offload, the "
    "schedules gpipe, 1f1b, interleaved:V, zb and zbv, the agreements sync, async:S, local:H, "
    "diloco:H, easgd:H, gossip:GRAPH and solo, /compress:METHOD, and +bf16, +channels_last, "
    "+recompute and, without pp and tp, +compile"
)


@dataclass(frozen=True)
class Strategy:
    """How the work is split. Make one with :meth:`parse`; the fields are its parts.

    ``axes``: (name, degree) of pp, dp, cp, tp, ep, outermost first; degrees of 1 are left out.
    ``mb``: the microbatches that were asked for, None for the default (:attr:`microbatches`).
    ``exact``: the number of logical shards, None for sums in the order of ranks.

    Raises Refused for parts that contradict each other.
    """

    axes: tuple[tuple[str, int], ...] = ()
    is_auto: bool = False
    zero: Zero | None = None
    agreement: Agreement = EVERY_STEP
    compress: Compress | None = None
    mb: int | None = None
    sp: bool = False
    offload: bool = False
    schedule: Schedule | None = None
    bf16: bool = False
    compile: bool = False
    channels_last: bool = False
    recompute: Literal["full", "selective"] | None = None
    exact: int | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._normalise()
        for refusal in checks.contradictions(self):
            raise refusal

    def _check_numbers(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) < len(names) or not set(names) <= set(grammar.AXES):
            raise StrategyError(f"axes are {', '.join(grammar.AXES)}, each once; given {names}")
        for _, degree in self.axes:
            grammar.DEGREE.check(degree)
        if self.mb is not None:
            grammar.MICROBATCHES.check(self.mb)
        if self.exact is not None:
            grammar.SHARDS.check(self.exact)
        if self.recompute not in (None, "full"):
            grammar.RECOMPUTE.check(self.recompute)

    def _normalise(self) -> None:
        """Leave out what says nothing, so that equal strategies are equal values."""
        self._set("axes", tuple((name, degree) for name, degree in self.axes if degree != 1))
        if self.agreement == Async(0):
            self._set("agreement", EVERY_STEP)
        if self.is_auto:
            return
        if self.zero is not None and self.zero.group == self.dp:
            self._set("zero", Zero(self.zero.stage))
        if isinstance(self.agreement, Easgd) and self.agreement.alpha == self._easgd_alpha:
            self._set("agreement", replace(self.agreement, alpha=None))
        if self.schedule == Schedule("1f1b") and self.pp > 1:
            self._set("schedule", None)
        if self.mb == self._default_microbatches:
            self._set("mb", None)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """Read the notation.

        Raises StrategyError for a text that does not follow it, naming character and part, and
        Refused for parts that can't be together, both with the nearest that works.
        """
        try:
            return cls(**grammar.read(text.strip()))
        except StrategyError as error:
            raise type(error)(f"strategy {text!r}: {error.message}", hint=error.hint) from None

    @property
    def pp(self) -> int:
        """Stages of the pipeline."""
        return self.degree("pp")

    @property
    def dp(self) -> int:
        """Ranks on the data axis."""
        return self.degree("dp")

    @property
    def cp(self) -> int:
        """Ranks that share a sequence."""
        return self.degree("cp")

    @property
    def tp(self) -> int:
        """Ranks that share a layer."""
        return self.degree("tp")

    @property
    def ep(self) -> int:
        """Ranks that share the experts of a layer; they are among dp·cp."""
        return self.degree("ep")

    def degree(self, axis: str) -> int:
        """The degree of an axis, 1 if it is not there."""
        return dict(self.axes).get(axis, 1)

    @property
    def world_size(self) -> int:
        """pp·dp·cp·tp: the number of ranks. Raises Refused for `auto`."""
        self._must_be_resolved()
        return self.pp * self.dp * self.cp * self.tp

    @property
    def replicas(self) -> int:
        """Copies of the model that the agreement acts between: shard groups, if there are any."""
        if self.zero is None:
            return self.dp
        return self.dp // (self.zero.group or self.dp)

    @property
    def shards(self) -> int | None:
        """Ranks in a shard group, where that is not the whole data axis."""
        return None if self.zero is None else self.zero.group

    @property
    def saves_memory(self) -> bool:
        """Whether a rank keeps less than the whole model and its optimizer's state."""
        return self.zero is not None or self.pp * self.tp > 1

    @property
    def microbatches(self) -> int:
        """Pieces of a replica's share of the batch that are worked on one after another.

        Default: 1, and 4·pp in a pipeline (Huang et al. 2019, §2.3: the bubble is then negligible).
        """
        return self._default_microbatches if self.mb is None else self.mb

    @property
    def _default_microbatches(self) -> int:
        return 4 * self.pp if self.pp > 1 else 1

    @property
    def _easgd_alpha(self) -> float:
        return 0.9 / self.replicas

    def __str__(self) -> str:
        return self._text(full=False)

    def resolved(self) -> str:
        """The notation with every choice written out; it parses to an equal strategy.

        Raises Refused for `auto`, which is a choice still to be made.
        """
        self._must_be_resolved()
        return self._text(full=True)

    def _text(self, full: bool) -> str:
        head = ".".join(f"{name}{degree}" for name, degree in self.axes) or "single"
        text = "auto" if self.is_auto else head
        text += "".join(f"/{option}" for option in self._options(full) if option)
        return text + "".join(f"+{execution}" for execution in self._executions())

    def _options(self, full: bool) -> tuple[str, ...]:
        """The options in the notation's order; empty text for those that are not there."""
        zero, agreement, mb, schedule = self.zero, self.agreement, self.mb, self.schedule
        if full:
            mb = self.microbatches
            zero = Zero(3, self.dp) if zero == Zero(3) else zero
            schedule = Schedule("1f1b") if schedule is None and self.pp > 1 else schedule
            if isinstance(agreement, Easgd) and agreement.alpha is None:
                agreement = replace(agreement, alpha=self._easgd_alpha)
        return (
            str(zero or ""),
            agreement.text(full=True)
            if full
            else str("" if agreement == EVERY_STEP else agreement),
            str(self.compress or ""),
            "" if mb is None else f"mb:{mb}",
            "sp" if self.sp else "",
            "offload" if self.offload else "",
            str(schedule or ""),
        )

    def _executions(self) -> list[str]:
        names = [name for name in ("bf16", "compile", "channels_last") if getattr(self, name)]
        if self.recompute is not None:
            names.append("recompute" if self.recompute == "full" else "recompute:selective")
        return names if self.exact is None else [*names, f"exact:{self.exact}"]

    def _must_be_resolved(self) -> None:
        if self.is_auto:
            raise Refused(
                f"{self} is not a split yet: it has to be chosen for a recipe and a cluster",
                hint="Give axes, as in dp2, or use single.",
            )

    def check_runnable(self, batch_size: int, ranks_available: int | None = None) -> None:
        """Raises Refused if this version can't run the strategy, or not on this batch or machine.

        ``batch_size`` is the global batch; ``ranks_available`` None stands for as many as needed.
        """
        self._must_be_resolved()
        missing = checks.not_yet(self)
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise Refused(
                f"strategy {self}: {', '.join(missing)} {verb} not in this version yet",
                hint=f"This version runs {RUNS_NOW}.",
            )
        if self.dp > batch_size:
            most = f"dp{batch_size}" if batch_size > 1 else "single"
            raise Refused(
                f"dp{self.dp} on a batch of {batch_size}: at most {most}",
                hint="Each replica needs an example of the global batch: use a smaller dp, or a "
                "larger batch_size.",
            )
        self._check_members(batch_size)
        if ranks_available is not None and self.world_size > ranks_available:
            near = f"dp{ranks_available}" if ranks_available > 1 else "single"
            raise Refused(
                f"strategy {self} needs {self.world_size} ranks, and there are {ranks_available}",
                hint=f"Nearest that works: {near}.",
            )

    def _check_members(self, batch_size: int) -> None:
        way = self.agreement
        if isinstance(way, Solo) and not way.full and (way.members or 0) > batch_size:
            raise Refused(
                f"{way.members} members on a batch of {batch_size}: some would see no example",
                hint="Use fewer members, a larger batch_size, or solo:full.",
            )
        if isinstance(way, Solo) and 0 < (way.members or 0) < self.replicas:
            raise Refused(
                f"{way.members} members on {self.replicas} replicas: some would have none",
                hint=f"Nearest that works: dp{way.members}, or members={self.replicas}.",
            )

    def to_json(self) -> dict[str, Any]:
        """`{"strategy": canonical, "resolved": …, "world_size": …}`; null for `auto`'s unknowns."""
        known = not self.is_auto
        return {
            "strategy": str(self),
            "resolved": self.resolved() if known else None,
            "world_size": self.world_size if known else None,
        }

    @classmethod
    def from_json(cls, value: object) -> "Strategy":
        """Read :meth:`to_json`'s mapping, or the notation as plain text. Raises StrategyError."""
        text = value.get("strategy") if isinstance(value, Mapping) else value
        if not isinstance(text, str):
            raise StrategyError(
                f"a strategy must be text or a mapping with the key `strategy`; given {value!r}"
            )
        return cls.parse(text)

    def write(self, path: Path | str) -> None:
        """Write :meth:`to_json` to a file."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path | str) -> "Strategy":
        """Read a file that :meth:`write` made. Raises RecipeError (no file) or StrategyError."""
        from shoal import yaml_source  # pydantic: a command parses strategies before it is loaded

        return cls.from_json(yaml_source.load(path).value)
