"""Texts for a terminal: an error on one screen, the closing lines of a run.

    error: rank 1, step 40, backward: the loss is NaN
    hint: lower optimizer.lr (0.1), or set optimizer.clip_norm

What users and their code wrote is shown as it is: no markup in it is read, and the control
characters that could steer a terminal are replaced.
"""

import math
import shlex
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from shoal.errors import ShoalError
from shoal.report.staleness import staleness_text
from shoal.report.values import number, seconds_text, text_of
from shoal.units import format_count

# A terminal's usual height, less the lines around the message.
_MAX_LINES = 16


def printable(text: object) -> str:
    """``text`` with control characters, apart from line ends and tabs, replaced by ``�``."""
    return "".join(
        one if one in "\n\t" or (one.isprintable() or one == " ") else "�" for one in str(text)
    )


def show_error(error: ShoalError, stream: TextIO, debug: bool = False) -> None:
    """Print ``error`` to ``stream``: where and what, then the hint; tracebacks with ``debug``.

    A message longer than a screen is cut, unless ``debug``.
    """
    from rich.console import Console
    from rich.text import Text

    lines = printable(f"{error.where}: {error.message}" if error.where else error.message)
    shown = lines.splitlines() or [type(error).__name__]
    if len(shown) > _MAX_LINES and not debug:
        more = len(shown) - _MAX_LINES
        shown = [*shown[:_MAX_LINES], f"… and {more:,} more lines (all of them with --debug)"]
    first, *others = shown
    text = Text.assemble(("error: ", "bold red"), first)
    for line in others:
        text.append(f"\n  {line}")
    if error.hint:
        text.append("\nhint: ", "bold")
        text.append("\n  ".join(printable(error.hint).splitlines()))
    if debug:
        text.append(f"\n\n{printable(_traceback(error))}")
    elif error.traceback:
        text.append("\n(the traceback is shown with --debug)", "dim")
    Console(file=stream, highlight=False).print(text, soft_wrap=True)


def _traceback(error: ShoalError) -> str:
    if error.traceback:
        return error.traceback.rstrip()
    return "".join(traceback.format_exception(error)).rstrip()


def metrics_text(metrics: Mapping[str, Any]) -> str:
    """``accuracy 97.81 %, loss 0.0812``: shares as per cent, the rest as they are."""
    parts = []
    for name, given in metrics.items():
        value = number(given)
        if math.isnan(value) and not isinstance(given, float):
            continue
        share = name in ("accuracy", "top5")
        parts.append(printable(name) + (f" {value * 100:.2f} %" if share else f" {value:.4g}"))
    return ", ".join(parts)


def summary_lines(summary: Mapping[str, Any]) -> str:
    """The few closing lines after `train`, from its document (any key may be missing).

    Result, time and speed, the folder, the report if it was written, and how to resume a run
    that did not end.
    """
    state = str(summary.get("state") or "ended")
    lines = [_result(summary, state)]
    if speed := _speed(summary):
        lines.append(speed)
    if staleness := staleness_text(summary):
        lines.append(staleness)
    run = summary.get("run")
    if run:
        folder = Path(str(run))
        lines.append(f"run     {folder}")
        if (folder / "report.html").is_file():
            lines.append(f"report  {folder / 'report.html'}")
        if state != "done" and summary.get("checkpoint"):
            lines.append(f"resume  {_resume_command(folder, summary.get('strategy'))}")
    return printable("\n".join(lines))


def _result(summary: Mapping[str, Any], state: str) -> str:
    metrics = summary.get("metrics")
    text = metrics_text(metrics) if isinstance(metrics, Mapping) else ""
    steps = number(summary.get("steps"))
    after = f" after {format_count(steps)} steps" if math.isfinite(steps) else ""
    reason = f" ({text_of(summary['reason'])})" if summary.get("reason") else ""
    return f"{state}{after}{reason}" + (f": {text}" if text else "")


def _speed(summary: Mapping[str, Any]) -> str:
    parts = []
    seconds, rate = number(summary.get("seconds")), number(summary.get("samples_per_second"))
    if math.isfinite(seconds):
        parts.append(seconds_text(seconds))
    if math.isfinite(rate):
        parts.append(f"{format_count(rate)} samples/s")
    world = number(summary.get("world_size"))
    if math.isfinite(world):
        ranks = f"on {world:g} rank{'s' if world != 1 else ''}"
        parts.append(f"{ranks} ({summary['strategy']})" if summary.get("strategy") else ranks)
    return ", ".join(parts)


def _resume_command(folder: Path, strategy: object) -> str:
    words = ["shoal", "train", str(folder / "recipe.yaml")]
    if isinstance(strategy, str) and strategy:
        words += ["--strategy", strategy]
    return shlex.join([*words, "--out", str(folder), "--resume"])
