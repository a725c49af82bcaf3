"""How a run ended, for whoever called it."""

from dataclasses import dataclass
from typing import Any

from shoal.errors import ShoalError
from shoal.run import Run


@dataclass(frozen=True)
class Ended:
    """How a run ended: its folder, the contract's document, and what went wrong if it did.

    ``exit_status`` is the command's: 0, 3 (`error` says why), 75, or 128 + a second signal's
    number. ``tells``: whether it is this process's part to tell of it; of joined ranks, rank 0's.
    """

    run: Run
    document: dict[str, Any]
    exit_status: int
    error: ShoalError | None = None
    tells: bool = True


def after_start(error: ShoalError) -> int:
    """The exit status of an error once ranks have started: then nothing is a matter of usage."""
    return 3 if error.exit_status == 2 else error.exit_status
