"""Every error that a user can cause, in one tree.

    ShoalError
    ├── UsageError                 exit 2: before any rank starts
    │   ├── RecipeError            keys, types, numbers of a recipe or a cluster, all at once
    │   ├── StrategyError          a strategy that cannot be read
    │   │   └── Refused            one that can be read, and not run: impossible, or not built yet
    │   ├── DataMissing            files that are not there, or are not what the recipe says
    │   ├── RunFolderError         a folder in use, of another recipe, or with nothing to resume
    │   └── WorldError             ranks that are not as many as the strategy needs, or cannot meet
    ├── RunError                   exit 3: after the start
    │   ├── BadExample             an example that cannot be read
    │   ├── NoGradient             a loss that no parameter can learn from
    │   ├── NotFinite              a loss or a gradient that is NaN or infinite
    │   ├── DiskFull               a checkpoint that could not be written
    │   ├── OutOfMemory            a tensor that did not fit on a rank
    │   ├── CheckpointDamaged      a checkpoint that is not what was written
    │   ├── RanksDiffer            ranks that start from other versions, recipes, weights or data
    │   ├── ReplicasDiffer         replicas whose weights have drifted apart
    │   ├── RankLost               a rank that was killed, or left without a word
    │   ├── PeerLost               what the others see when a rank is lost: never the first cause
    │   └── UserCodeError          an exception in the user's model, objective or data
    └── Stopped                    exit 75: asked to stop by a signal; resumable

An error says what was given, what is needed and what to change. It travels from a rank to its
supervisor as JSON (:meth:`ShoalError.to_json`), never as a pickle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self


class ShoalError(Exception):
    """Root of every error that a user can cause.

    ``message`` says what was given and what is needed, ``hint`` what to change. ``rank``, ``step``
    and ``phase`` say where it happened, if it happened on a rank.
    """

    exit_status = 3

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        rank: int | None = None,
        step: int | None = None,
        phase: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.rank = rank
        self.step = step
        self.phase = phase
        self.traceback: str | None = None

    @property
    def where(self) -> str:
        """``rank 1, step 40, backward``, as far as it is known; empty otherwise."""
        parts = []
        if self.rank is not None:
            parts.append(f"rank {self.rank}")
        if self.step is not None:
            parts.append(f"step {self.step}")
        if self.phase is not None:
            parts.append(self.phase)
        return ", ".join(parts)

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n{self.hint}" if self.hint else text

    def located(
        self, *, rank: int | None = None, step: int | None = None, phase: str | None = None
    ) -> Self:
        """Fill in where it happened, unless it is known already."""
        self.rank = rank if self.rank is None else self.rank
        self.step = step if self.step is None else self.step
        self.phase = phase if self.phase is None else self.phase
        return self

    def to_json(self) -> dict[str, Any]:
        """The error as one JSON value: how it travels from a rank to its supervisor."""
        return {
            "kind": type(self).__name__,
            "message": self.message,
            "hint": self.hint,
            "rank": self.rank,
            "step": self.step,
            "phase": self.phase,
            "traceback": self.traceback,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> "ShoalError":
        """Rebuild an error from :meth:`to_json`; an unknown kind becomes a `RunError`."""
        cls = _KINDS.get(value.get("kind", ""), RunError)
        error = cls.__new__(cls)
        ShoalError.__init__(
            error,
            value["message"],
            hint=value.get("hint"),
            rank=value.get("rank"),
            step=value.get("step"),
            phase=value.get("phase"),
        )
        error.traceback = value.get("traceback")
        return error


class UsageError(ShoalError):
    """What was asked for cannot be started: found before any rank starts."""

    exit_status = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a file of values: where, what was given, what is allowed."""

    path: str
    message: str
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = ""
        if self.file is not None:
            place = f"{self.file}:{self.line}: " if self.line is not None else f"{self.file}: "
        return f"{place}{self.path}: {self.message}" if self.path else f"{place}{self.message}"


class RecipeError(UsageError):
    """Every problem of a recipe (or of a cluster's file), all at once."""

    def __init__(self, problems: Sequence[Problem], *, hint: str | None = None) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems), hint=hint)


class StrategyError(UsageError):
    """A strategy that does not follow the notation."""


class Refused(StrategyError):
    """A strategy that can be read and not run: impossible here, or not built yet."""


class DataMissing(UsageError):
    """Files that are not there, or that are not what the recipe says."""


class RunFolderError(UsageError):
    """A run folder that is in use, holds another recipe's run, or has nothing to resume."""


class WorldError(UsageError):
    """A number of ranks that the strategy does not need, or ranks that cannot meet."""


class RunError(ShoalError):
    """Something went wrong after the ranks had started."""


class BadExample(RunError):
    """An example that cannot be read."""


class NoGradient(RunError):
    """A loss that no parameter can learn from."""


class NotFinite(RunError):
    """A loss or a gradient that is NaN or infinite."""


class DiskFull(RunError):
    """A file that could not be written for want of space."""


class OutOfMemory(RunError):
    """A tensor for which a rank had no memory left."""


class CheckpointDamaged(RunError):
    """A checkpoint that is not what was written."""


class RanksDiffer(RunError):
    """Ranks that start from different versions, recipes, weights or data."""


class ReplicasDiffer(RunError):
    """Replicas whose weights have drifted apart."""


class RankLost(RunError):
    """A rank that was killed, or that left without a word."""


class PeerLost(RunError):
    """What the other ranks see when one is lost: never the first cause."""


class UserCodeError(RunError):
    """An exception raised by the user's model, objective, metric or data."""


class Stopped(ShoalError):
    """Asked to stop by a signal; what was saved can be resumed."""

    exit_status = 75


def _tree(cls: type[ShoalError]) -> dict[str, type[ShoalError]]:
    kinds = {cls.__name__: cls}
    for child in cls.__subclasses__():
        kinds.update(_tree(child))
    return kinds


_KINDS = _tree(ShoalError)
