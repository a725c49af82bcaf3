"""What can't be: strategies that contradict themselves, and those that this version can't run.

    contradiction(Strategy...)   -> Refused("zero1 shards over dp, and dp is 1", hint="… dp2/zero1")

Each check is a function of a strategy that gives the refusal, or None.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from shoal.errors import Refused
from shoal.strategy.agreements import Async, DiLoCo, Easgd, Gossip, Solo, Sync

if TYPE_CHECKING:
    from shoal.strategy.value import Strategy


def contradictions(strategy: Strategy) -> Iterator[Refused]:
    """Every reason why no version could run this strategy; those of degrees not for `auto`."""
    if isinstance(strategy.agreement, Solo) and strategy.compress is not None:
        yield Refused("solo sends nothing to compress", hint="Leave compress or solo out.")
    if strategy.is_auto:
        return
    for check in (
        _zero,
        _groups,
        _experts,
        _tensor,
        _pipeline,
        _servers,
        _compress,
        _outer,
        _elastic,
    ):
        refusal = check(strategy)
        if refusal is not None:
            yield refusal


def _zero(strategy: Strategy) -> Refused | None:
    zero, dp = strategy.zero, strategy.dp
    if zero is None:
        return None
    if dp == 1:
        near = ".".join(f"{name}{degree}" for name, degree in (*strategy.axes, ("dp", 2)))
        return Refused(
            f"{zero} shards over dp, and dp is 1", hint=f"Nearest that works: {near}/{zero}."
        )
    if zero.group is not None and dp % zero.group:
        fitting = [f"zero3:{group}" for group in _nearest_divisors(dp, zero.group) if group > 1]
        return Refused(
            f"shard groups of {zero.group} do not divide dp{dp}",
            hint=f"Nearest that works: {' or '.join(fitting)}.",
        )
    return None


def _groups(strategy: Strategy) -> Refused | None:
    """Agreements act between shard groups: one group over all of dp has nobody to agree with."""
    zero, agreement = strategy.zero, strategy.agreement
    if zero is None or isinstance(agreement, Sync) or strategy.dp == 1 or strategy.replicas > 1:
        return None
    groups = [group for group in range(2, strategy.dp) if strategy.dp % group == 0]
    near = (
        f"zero3:{groups[-1]}, or no zero" if groups else f"dp{2 * strategy.dp}/zero3:{strategy.dp}"
    )
    return Refused(
        f"{agreement} acts between shard groups, and {zero} makes all of dp{strategy.dp} one group",
        hint=f"Nearest that works: {near}.",
    )


def _experts(strategy: Strategy) -> Refused | None:
    ranks = strategy.dp * strategy.cp
    if ranks % strategy.ep == 0:
        return None
    fitting = [f"ep{degree}" for degree in _nearest_divisors(ranks, strategy.ep) if degree > 1]
    near = " or ".join(fitting) or f"dp{strategy.ep}.ep{strategy.ep}"
    return Refused(
        f"ep{strategy.ep} does not divide dp·cp, which is {ranks}",
        hint=f"Nearest that works: {near}.",
    )


def _tensor(strategy: Strategy) -> Refused | None:
    if not strategy.sp or strategy.tp > 1:
        return None
    return Refused(
        "sp cuts over tp, and tp is 1", hint="Nearest that works: add tp2, or leave sp out."
    )


def _pipeline(strategy: Strategy) -> Refused | None:
    if strategy.schedule is None or strategy.pp > 1:
        return None
    name = strategy.schedule
    return Refused(
        f"{name} orders a pipeline, and pp is 1",
        hint=f"Nearest that works: add pp2, or leave {name} out.",
    )


def _servers(strategy: Strategy) -> Refused | None:
    agreement, replicas = strategy.agreement, strategy.replicas
    if not isinstance(agreement, Async):
        return None
    if agreement.staleness == 0:
        return Refused(
            f"async:0 is sync, which has no options; given {agreement}",
            hint=f"Nearest that works: sync, or {replace(agreement, staleness=1)}.",
        )
    if agreement.servers == 0 or agreement.servers < replicas:
        return _copies(agreement, agreement.servers or replicas)
    near = f"servers={replicas - 1}" if replicas > 1 else "leave servers out"
    return Refused(
        f"servers={agreement.servers} leaves no worker of dp{replicas}",
        hint=f"Nearest that works: {near}.",
    )


def _copies(agreement: Async, owners: int) -> Refused | None:
    if agreement.copies <= min(1, owners - 1):
        return None
    few = "a copy lies on another owner, and there is one" if owners == 1 else "one copy is all"
    return Refused(
        f"copies={agreement.copies} with {owners} owners of parameters: {few}",
        hint=f"Nearest that works: {replace(agreement, copies=min(1, owners - 1))}.",
    )


def _compress(strategy: Strategy) -> Refused | None:
    if strategy.compress is None or strategy.dp * strategy.cp > 1:
        return None
    name = strategy.compress
    return Refused(
        f"{name} makes smaller what replicas send, and dp is 1",
        hint=f"Nearest that works: add dp2, or leave {name} out.",
    )


def _outer(strategy: Strategy) -> Refused | None:
    agreement = strategy.agreement
    if not isinstance(agreement, DiLoCo):
        return None
    if agreement.overlap and agreement.every == 1:
        return Refused(
            f"{agreement} has no inner step beside which to send",
            hint=f"Nearest that works: {replace(agreement, every=2)}.",
        )
    if agreement.wire != "float32" and strategy.compress is not None:
        return Refused(
            f"wire={agreement.wire} and {strategy.compress} both say what is sent",
            hint="Leave one of them out.",
        )
    return None


def _elastic(strategy: Strategy) -> Refused | None:
    """c ← (1 - nα) c + α Σ w_r: beyond nα = 1 the old centre counts less than nothing."""
    agreement, replicas = strategy.agreement, strategy.replicas
    if not isinstance(agreement, Easgd) or agreement.alpha is None:
        return None
    if agreement.alpha * replicas <= 1 + 1e-9:
        return None
    near = replace(agreement, alpha=int(1000 / replicas) / 1000)
    return Refused(
        f"alpha={agreement.alpha:g} over {replicas} replicas: the centre would move further than "
        "the replicas lie from it",
        hint=f"alpha · replicas is 1 at most: {near}.",
    )


def _nearest_divisors(number: int, near: int) -> list[int]:
    """The divisors of ``number`` next below and next above ``near``."""
    small = [each for each in range(1, int(number**0.5) + 1) if number % each == 0]
    divisors = sorted({*small, *(number // each for each in small)})
    below = [each for each in divisors if each < near][-1:]
    return below + [each for each in divisors if each > near][:1]


def not_yet(strategy: Strategy) -> list[str]:
    """The parts of a strategy that the notation knows and this version can't run."""
    names = {"cp": "context", "ep": "expert"}
    missing = [
        f"{axis}{degree} ({names[axis]} parallelism)"
        for axis, degree in strategy.axes
        if axis in names
    ]
    missing += _not_sent_yet(strategy)
    missing += _not_async_yet(strategy)
    if strategy.zero is not None and strategy.zero.stage > 1 and strategy.compile:
        missing.append(f"{strategy.zero} with +compile")
    missing += _not_staged_yet(strategy)
    if strategy.recompute == "selective":
        missing.append("recompute:selective")
    if strategy.exact is not None:
        missing.append(f"exact:{strategy.exact}")
    return missing


def _not_async_yet(strategy: Strategy) -> list[str]:
    """What asynchronous SGD can't be combined with yet: there a replica is one whole rank."""
    if not isinstance(strategy.agreement, Async):
        return []
    cut = [f"{name}{degree}" for name, degree in strategy.axes if name in ("pp", "tp")]
    cut += [str(strategy.zero)] if strategy.zero is not None else []
    cut += ["offload"] if strategy.offload else []
    return [f"{strategy.agreement} with {' and '.join(cut)}"] if cut else []


def _not_sent_yet(strategy: Strategy) -> list[str]:
    """Where what replicas send can't be made smaller yet."""
    compress, agreement, zero = strategy.compress, strategy.agreement, strategy.zero
    if compress is None:
        return []
    if isinstance(agreement, Async):
        return [f"{compress} with async"]
    if isinstance(agreement, Gossip) and agreement.graph != "complete":
        return [f"{compress} with {agreement}"]
    if isinstance(agreement, Sync) and zero is not None and zero.stage > 1:
        return [f"{compress} with {zero} and sync"]
    return []


def _not_staged_yet(strategy: Strategy) -> list[str]:
    """What a model that is traced and cut (pp, tp) can't be combined with yet."""
    if strategy.pp * strategy.tp == 1:
        return []
    return ["+compile with pp or tp"] if strategy.compile else []
