"""Which line of the user's code an operation, or an error, comes from.

    "model.py:12: x = self.head(x) * x.sum().item()"

    line = of_stack(node.meta["stack_trace"])

The innermost frame outside torch and Shoal; for Shoal's own models one of theirs; for a model made
of torch's layers alone one of torch's.
"""

import linecache
import re
import traceback
from pathlib import Path

import torch

Frame = tuple[str, int, str]  # file, number, source

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n[ \t]*([^\n]*)')
_TORCH = str(torch.__path__[0])
_SHOAL = str(Path(__file__).parents[1])
_HERE = str(Path(__file__).parent)


def of_stack(text: str | None) -> str:
    """The line of a stack trace in Python's form, or an empty string."""
    found = _FRAME.findall(text or "")
    return _chosen([(file, int(number), source) for file, number, source in found])


def of_error(error: BaseException) -> str:
    """The line that an exception of torch's tracing is about, or an empty string."""
    if chosen := _chosen(_frames(error), torch_too=False):
        return chosen
    return of_stack(str(error))


def _frames(error: BaseException) -> list[Frame]:
    walked = traceback.walk_tb(error.__traceback__)
    return [
        (
            frame.f_code.co_filename,
            number,
            linecache.getline(frame.f_code.co_filename, number).strip(),
        )
        for frame, number in walked
    ]


def _chosen(frames: list[Frame], *, torch_too: bool = True) -> str:
    outside = [frame for frame in frames if not frame[0].startswith(("<", _HERE))]
    no_torch = [frame for frame in outside if not frame[0].startswith(_TORCH)]
    users = [frame for frame in no_torch if not frame[0].startswith(_SHOAL)]
    # An error's trace starts with our caller's frames: they are no part of the model.
    inside = _after_the_call(frames)
    users = [frame for frame in users if inside is None or frame in inside]
    no_torch = [frame for frame in no_torch if inside is None or frame in inside]
    for choice in (users, no_torch, outside if torch_too else []):
        if choice:
            file, number, source = choice[-1]
            return f"{file}:{number}: {source}"
    return ""


def _after_the_call(frames: list[Frame]) -> list[Frame] | None:
    """The frames inside the wrapper's call of the model, None where it is not among them."""
    last = max((i for i, frame in enumerate(frames) if frame[0].startswith(_HERE)), default=None)
    return None if last is None else frames[last + 1 :]
