"""The ways in which replicas agree, from every step to never: one frozen value each.

    str(DiLoCo(32, lr=0.5))                   # 'diloco:32:lr=0.5'
    DiLoCo(32).text(full=True)                # every choice written out

Each knows its own notation, `name[:value]{:key=value}`: the field made by `_value` is the value,
the others are the keys, left out where they have their defaults.
"""

from dataclasses import MISSING, Field, dataclass, field, fields
from math import inf
from typing import Any, ClassVar, Self

from shoal.errors import StrategyError
from shoal.strategy.kinds import Flag, Kind, Real, Switch, Whole, Word, did_you_mean


def _value(kind: Kind, default: Any = MISSING) -> Any:
    return field(default=default, metadata={"kind": kind, "is_value": True})


def _key(kind: Kind, default: Any) -> Any:
    return field(default=default, metadata={"kind": kind, "is_value": False})


@dataclass(frozen=True)
class Agreement:
    """When and how replicas come to agree on their weights."""

    name: ClassVar[str]
    apart: ClassVar[bool] = True
    """Whether a replica updates its own weights from its own gradients, between meetings."""

    def __post_init__(self) -> None:
        for each in fields(self):
            given = getattr(self, each.name)
            if given is None and each.default is None:
                continue
            try:
                each.metadata["kind"].check(given)
            except StrategyError as error:
                raise type(error)(f"{self.name}: {error.message}", hint=error.hint) from None

    def text(self, full: bool = False) -> str:
        """The notation: canonical, or with defaults written out too if ``full``."""
        text = self.name
        for each in fields(self):
            given, kind = getattr(self, each.name), each.metadata["kind"]
            if each.metadata["is_value"]:
                word = "" if given is None else kind.write(given)
                text += f":{word}" if word else ""
            elif given is not None and (full or given != each.default):
                text += f":{each.name}={kind.write(given)}"
        return text

    def __str__(self) -> str:
        return self.text()

    @classmethod
    def read(cls, pieces: list[str]) -> Self:
        """Build the part from what stands between its colons. Raises StrategyError."""
        known = {each.name: each for each in fields(cls)}
        value = next((each for each in known.values() if each.metadata["is_value"]), None)
        given: dict[str, Any] = {}
        if pieces and "=" not in pieces[0] and value is not None:
            given[value.name] = value.metadata["kind"].read(pieces[0])
            pieces = pieces[1:]
        elif value is not None and value.default is MISSING:
            kind = value.metadata["kind"]
            raise StrategyError(f"{cls.name} needs a value: {kind.what}: {kind.allowed}")
        keys = {name: each for name, each in known.items() if each is not value}
        for piece in pieces:
            name, content = _read_key(cls.name, piece, keys)
            if name in given:
                raise StrategyError(f"{name} is given twice")
            given[name] = content
        return cls(**given)


def _read_key(option: str, piece: str, keys: "dict[str, Field[Any]]") -> tuple[str, Any]:
    name, equals, content = piece.partition("=")
    if name not in keys:
        allowed = ", ".join(f"{key}={keys[key].metadata['kind'].allowed}" for key in keys)
        raise StrategyError(
            f"{option} takes {allowed or 'nothing more'}; given {piece!r}",
            hint=did_you_mean(name, list(keys)),
        )
    kind = keys[name].metadata["kind"]
    if not equals:
        raise StrategyError(f"{name} needs a value, {kind.allowed}, as in {name}=…")
    return name, kind.read(content)


@dataclass(frozen=True)
class Sync(Agreement):
    """Every step: gradients are summed over all replicas."""

    name: ClassVar[str] = "sync"
    apart: ClassVar[bool] = False


@dataclass(frozen=True)
class Async(Agreement):
    """Asynchronous SGD with bounded staleness, in optimizer steps.

    One set of weights, of which replicas have versions of different age.

    ``servers``: ranks that hold parameters and do not train, 0 for parameters sharded over the
    workers. ``compensate``: λ of delay compensation (Zheng et al. 2017, eq. 10), 0 for none.
    ``damp``: p of the staleness-scaled learning rate, lr · mean of (1 + staleness)^-p (p = 1: the
    rule of Zhang et al. 2016, arXiv 1511.05950), 0 for none. ``copies``: of each owner's part on
    another owner.
    """

    name: ClassVar[str] = "async"
    apart: ClassVar[bool] = False
    staleness: int = _value(Whole(0, "S, the largest staleness in optimizer steps", "async:{}"))
    servers: int = _key(Whole(0, "servers, the ranks that hold parameters", "servers={}"), 0)
    compensate: float = _key(Real(0, inf, "compensate, its λ", "compensate={}"), 0.0)
    damp: float = _key(Real(0, inf, "damp, the power p", "damp={}"), 0.0)
    copies: int = _key(Whole(0, "copies, of each owner's part (0 or 1)", "copies={}"), 0)

    def expendable(self, world_size: int) -> tuple[int, ...]:
        """The ranks that hold nothing that the others have not: workers, where servers own all.

        With copies any but rank 0, which hands out the claims.
        """
        if self.copies:
            return tuple(range(1, world_size))
        return tuple(range(self.servers, world_size)) if self.servers else ()


@dataclass(frozen=True)
class Local(Agreement):
    """Local SGD: weights are averaged every ``every`` steps (Stich 2019), from step ``after`` on.

    Before ``after`` replicas agree at each step (post-local SGD, Lin et al. 2020). ``state``:
    whether optimizer state is averaged as well.
    """

    name: ClassVar[str] = "local"
    every: int = _value(Whole(1, "H, the steps between two meetings", "local:{}"))
    after: int = _key(Whole(0, "after, the step that local steps begin at", "after={}"), 0)
    state: str = _key(Word(("own", "average"), "state, what becomes of optimizer state"), "own")


@dataclass(frozen=True)
class DiLoCo(Agreement):
    """DiLoCo: an outer Nesterov step on the averaged change of ``every`` inner steps.

    Defaults of ``lr`` and ``momentum``: Douillard et al. 2023, §3. ``fragments``, ``overlap`` and
    ``wire``: Streaming DiLoCo (Douillard et al. 2025).
    """

    name: ClassVar[str] = "diloco"
    every: int = _value(Whole(1, "H, the inner steps of an outer step", "diloco:{}"))
    lr: float = _key(Real(0, inf, "lr, the outer learning rate", inclusive=False), 0.7)
    momentum: float = _key(Real(0, 1, "momentum, of the outer step", "momentum={}"), 0.9)
    fragments: int = _key(Whole(1, "fragments, parts sent in turn", "fragments={}"), 1)
    overlap: bool = _key(Switch("overlap, sending while the next steps compute"), False)
    wire: str = _key(Word(("float32", "bf16", "int8"), "wire, the type that is sent"), "float32")


@dataclass(frozen=True)
class Easgd(Agreement):
    """Elastic averaging every ``every`` steps (Zhang, Choromanska, LeCun 2015).

    ``alpha``: the elastic step; None for the paper's 0.9 ÷ replicas (§5.1).
    """

    name: ClassVar[str] = "easgd"
    every: int = _value(Whole(1, "H, the steps between two meetings", "easgd:{}"))
    alpha: float | None = _key(Real(0, 1, "alpha, the elastic step", "alpha={}"), None)


@dataclass(frozen=True)
class Gossip(Agreement):
    """Weights are averaged with the neighbours in ``graph`` only (Lian et al. 2017)."""

    name: ClassVar[str] = "gossip"
    graph: str = _value(Word(("ring", "exponential", "complete"), "the graph of neighbours"))


@dataclass(frozen=True)
class Solo(Agreement):
    """Replicas never meet: each learns from its share of the data, or from all of it if ``full``.

    ``init``: whether they start from the same weights or each from its own. ``members``: how many
    models, dealt out to the replicas in turn; None for one each.
    """

    name: ClassVar[str] = "solo"
    full: bool = _value(Flag("full", "full, all of the data for each replica"), False)
    init: str = _key(Word(("same", "own"), "init, the weights at the start"), "same")
    members: int | None = _key(Whole(1, "members, the models in all", "members={}"), None)


AGREEMENTS: dict[str, type[Agreement]] = {
    each.name: each for each in (Sync, Async, Local, DiLoCo, Easgd, Gossip, Solo)
}
