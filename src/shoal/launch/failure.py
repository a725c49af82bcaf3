"""Any exception of a rank as an error that can be shown: whose it is, where it was raised."""

import traceback
from pathlib import Path

from shoal.errors import RunError, ShoalError

_OURS = str(Path(__file__).parents[1])


def described(error: BaseException, rank: int) -> ShoalError:
    """`error` with rank and traceback; what is no `ShoalError` becomes a `RunError`."""
    text = "".join(traceback.format_exception(error))
    known = error if isinstance(error, ShoalError) else _unforeseen(error)
    known.located(rank=rank)
    known.traceback = known.traceback or text
    return known


def _unforeseen(error: BaseException) -> RunError:
    return RunError(f"{type(error).__name__}: {error}", hint=_place(error))


def _place(error: BaseException) -> str | None:
    """The innermost line that is neither torch's nor Shoal's, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and not f.filename.startswith(_OURS)]
    if not frames:
        return None
    last = (own or frames)[-1]
    return f"in {last.filename}:{last.lineno}: {last.line}"
