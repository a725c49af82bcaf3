"""One cell of the coverage table: a model of the zoo beside one device under a strategy.

with LastingRanks(4) as ranks:
    outcome = run_cell(ranks, SUBJECTS["gpt"], "pp2.dp2/zero1")
outcome.verdict, outcome.error         # "equal", 3e-15

equal      every tensor that `shoal.verify` compares is one device's, to 1e-10
refused    a reason in words, before a number was wrong
wrong      something differs
broken     an exception that is no refusal, or a rank that died
hung       nothing for `timeout_s` seconds; the ranks are ended
"""

import contextlib
import faulthandler
import importlib.util
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self

from shoal.errors import NoGradient, ShoalError, StrategyError, UsageError
from shoal.launch import Context, Ranks
from shoal.recipe.component import read
from shoal.strategy import Strategy
from shoal.verify.on_rank import Functions, VerifyTask, verify_on_rank
from zoo import Subject

Verdict = Literal["equal", "refused", "wrong", "broken", "hung", "absent"]
GOOD: tuple[Verdict, ...] = ("equal", "refused", "absent")
REFUSALS = (UsageError, NoGradient)
STEPS = 3
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: ``error`` is the largest of all kinds, ``reason`` says why not."""

    verdict: Verdict
    error: float | None = None
    reason: str = ""
    seconds: float = 0.0
    said: tuple[str, ...] = ()  # warnings

    @property
    def good(self) -> bool:
        return self.verdict in GOOD

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, told: dict[str, Any]) -> Self:
        """From `to_json`."""
        return cls(**{**told, "said": tuple(told["said"])})


class Caller(Protocol):
    """Ranks that run one function after the other, and start again after a crash."""

    @property
    def process_ids(self) -> tuple[int, ...]: ...

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        ranks: int | None = None,
        on_message: Callable[[int, Any], None] = ...,
    ) -> list[Any]: ...


class LastingRanks:
    """Ranks for all cells: torch is imported once, and once more after a crash."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: Ranks | None = None

    @property
    def process_ids(self) -> tuple[int, ...]:
        return self._ranks.process_ids if self._ranks is not None else ()

    def call(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        ranks: int | None = None,
        on_message: Callable[[int, Any], None] = lambda _rank, _message: None,
    ) -> list[Any]:
        if self._ranks is None or not self._ranks.alive:
            self.close()
            self._ranks = Ranks(self.size, preload=("shoal.verify.on_rank",))
        try:
            return self._ranks.call(function, *arguments, ranks=ranks, on_message=on_message)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_cell(
    ranks: Caller, subject: Subject, strategy: str, *, timeout_s: float = TIMEOUT_S
) -> Outcome:
    """Verify one model under one strategy; never raises for what a cell can do."""
    began = time.perf_counter()
    outcome = _outcome(ranks, subject, strategy, timeout_s)
    return Outcome(**{**outcome.to_json(), "seconds": round(time.perf_counter() - began, 2)})


def _outcome(ranks: Caller, subject: Subject, strategy: str, timeout_s: float) -> Outcome:
    if subject.family == "transformers" and importlib.util.find_spec("transformers") is None:
        return Outcome("absent", reason="transformers is not installed")
    try:
        parsed = Strategy.parse(strategy)
        parsed.check_runnable(batch_size=max(parsed.dp, 1))
    except StrategyError as error:
        return Outcome("refused", reason=str(error))
    refusals: list[str] = []
    hung = threading.Event()

    def note(_rank: int, message: dict[str, Any]) -> None:
        if "refused" in message:
            refusals.append(message["refused"])

    def give_up() -> None:
        hung.set()
        for process_id in ranks.process_ids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)

    timer = threading.Timer(timeout_s, give_up)
    timer.start()
    try:
        task = VerifyTask(functions_of(subject), strategy, STEPS)
        found = ranks.call(
            verify_or_say_why_not, task, timeout_s, ranks=parsed.world_size, on_message=note
        )
    except ShoalError as error:
        return _without_findings(error, refusals, hung.is_set(), timeout_s)
    finally:
        timer.cancel()
    return _judged(found[0])


def functions_of(subject: Subject) -> Functions:
    """A subject as `shoal.verify` wants it."""
    return Functions(
        subject.model_fn,
        subject.batch_fn,
        subject.loss_fn,
        None,
        read("optimizer", dict(subject.optimizer)),
        subject.normalize_over,
    )


def verify_or_say_why_not(context: Context, task: VerifyTask, timeout_s: float) -> dict[str, Any]:
    """`verify_on_rank`, on a rank that outlives a refusal."""
    faulthandler.dump_traceback_later(0.9 * timeout_s, exit=False)  # where it hangs, on stderr
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = verify_on_rank(context, task)
        except REFUSALS as error:
            # Said at once: the others may be waiting for this rank, and never come back.
            context.send({"refused": str(error)})
            _leave_groups()
            found = {"refused": str(error)}
        finally:
            faulthandler.cancel_dump_traceback_later()
    ours = [str(each.message) for each in said if issubclass(each.category, UserWarning)]
    return {**found, "said": sorted(set(ours))}


def _leave_groups() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _without_findings(
    error: ShoalError, refusals: list[str], hung: bool, timeout_s: float
) -> Outcome:
    if refusals:  # on some ranks only: as a program of its own, all of them would have ended
        return Outcome("refused", reason=refusals[0])
    if hung:
        return Outcome("hung", reason=f"no answer within {timeout_s:.0f} s")
    if isinstance(error, REFUSALS):
        return Outcome("refused", reason=str(error))
    return Outcome("broken", reason=f"{type(error).__name__}: {error}")


def _judged(found: dict[str, Any]) -> Outcome:
    said = tuple(found["said"])
    if "refused" in found:
        return Outcome("refused", reason=found["refused"], said=said)
    errors = [error for error in found["max_error"].values() if error is not None]
    worst = max(errors, default=None)
    first = found["first_difference"]
    if first is not None:
        place = f"{first['kind']} {first['name']}, step {first['step']}, by {first['error']:.2g}"
        return Outcome("wrong", worst, f"{place}: {found['cause']}", said=said)
    needed = ("output", "loss", "gradient", "parameter")
    missing = [kind for kind in needed if found["max_error"][kind] is None]
    if missing:
        return Outcome("broken", reason=f"nothing was compared of: {', '.join(missing)}", said=said)
    return Outcome("equal", worst, said=said)
