"""What a run says while it trains: a bar on a terminal, plain lines elsewhere.

    message (a JSON object of rank 0, from any of its threads)  →  View.show  →  standard error

    with live.view() as view:
        view.show({"kind": "start", "name": "digits", "total_steps": 240, ...})
        view.show({"kind": "step", "step": 1, "loss": 2.31, ...})

Messages are read leniently: an unknown kind is nothing, a missing key is left out of the text.
"""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from shoal.report.text import metrics_text, printable
from shoal.report.values import number, seconds_text
from shoal.units import format_bytes, format_count

Message = Mapping[str, Any]

# Plain lines: a minute's run prints about ten of them, a day's one every five minutes.
_LEAST_SECONDS, _LEAST_SHARE, _SILENCE_SECONDS = 5.0, 0.1, 300.0
# Ten times a second, which is rich's default, costs 1.4 % of a core that the ranks could use.
_DRAWN_PER_SECOND = 4
# Columns kept for the bar itself and the time left.
_BAR_AND_CLOCK = 16


class View(Protocol):
    """Shows the messages of a run; leaving it gives the terminal back as it was."""

    def show(self, message: Message) -> None:
        """Show one message, from any thread; unknown kinds are ignored."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def view(
    console_stream: TextIO | None = None,
    *,
    terminal: bool | None = None,
    verbose: bool = False,
) -> View:
    """A view on ``console_stream`` (default: standard error).

    ``terminal`` None asks the stream whether it is one. ``verbose`` also tells of every step's
    line and of checkpoints.
    """
    stream = sys.stderr if console_stream is None else console_stream
    if terminal is None:
        terminal = stream.isatty()
    return TerminalView(stream, verbose=verbose) if terminal else PlainView(stream, verbose=verbose)


class PlainView:
    """Lines for a log: start, now and then a step, every evaluation and event, end."""

    def __init__(
        self,
        stream: TextIO,
        *,
        verbose: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._verbose = verbose
        self._clock = clock
        self._lock = threading.Lock()
        self._total = math.nan
        self._shown: tuple[float, float] | None = None

    def show(self, message: Message) -> None:
        with self._lock:
            self._show(message)

    def _show(self, message: Message) -> None:
        kind = message.get("kind")
        if kind == "start":
            self._total = number(message.get("total_steps"))
        if kind == "step":
            if not self._due(number(message.get("step"))):
                return
            line = step_line(message, self._total)
        else:
            line = line_of(message, verbose=self._verbose)
        if line:
            with contextlib.suppress(OSError):  # nobody reads any more: the run goes on
                self._stream.write(f"{line}\n")
                self._stream.flush()

    def _due(self, step: float) -> bool:
        """Whether a step's line is due: the first, then after 5 s and a tenth of the steps."""
        now = self._clock()
        if self._shown is not None and not self._verbose:
            waited = now - self._shown[0]
            share = (step - self._shown[1]) / self._total
            enough = share >= _LEAST_SHARE or not math.isfinite(share)
            if waited < _LEAST_SECONDS or not (enough or waited >= _SILENCE_SECONDS):
                return False
        self._shown = (now, step)
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class TerminalView:
    """A progress bar on the last line; evaluations and events scroll above it."""

    def __init__(self, stream: TextIO, *, verbose: bool = False) -> None:
        from rich.console import Console

        self._verbose = verbose
        self._console = Console(file=stream, force_terminal=True, highlight=False)
        # Standard output belongs to the verb's document; stray writes to standard error (warnings)
        # go above the bar.
        self._progress = _progress(self._console, redirect_stderr=stream is sys.stderr)
        self._task: Any = None
        self._total = math.nan

    def show(self, message: Message) -> None:
        kind = message.get("kind")
        if kind == "start":
            self._print(line_of(message, verbose=self._verbose))
            self._begin(message)
        elif kind == "step":
            self._advance(message)
        else:
            if kind == "end":
                self._progress.stop()
            self._print(line_of(message, verbose=self._verbose))

    def _begin(self, message: Message) -> None:
        total = self._total = number(message.get("total_steps"))
        first = number(message.get("first_step"))
        self._task = self._progress.add_task(
            "",
            total=total if math.isfinite(total) else None,
            completed=first if math.isfinite(first) else 0,
            status="waiting for the first step",
        )
        self._progress.start()

    def _advance(self, message: Message) -> None:
        step = number(message.get("step"))
        if self._task is None or not math.isfinite(step):
            return
        text = status(message, self._total, self._console.width)
        self._progress.update(self._task, completed=step, status=text)

    def _print(self, line: str) -> None:
        from rich.text import Text

        if line:
            self._console.print(Text(line), soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Also on Ctrl-C: gives the cursor and standard error back.
        self._progress.stop()


def _progress(console: Any, *, redirect_stderr: bool) -> Any:
    from rich import progress

    return progress.Progress(
        progress.BarColumn(bar_width=None),
        progress.TextColumn("{task.fields[status]}", markup=False),
        progress.TimeRemainingColumn(compact=True),
        console=console,
        expand=True,
        refresh_per_second=_DRAWN_PER_SECOND,
        redirect_stdout=False,
        redirect_stderr=redirect_stderr,
    )


def status(message: Message, total: float, width: int) -> str:
    """What stands beside the bar of a terminal ``width`` columns wide, as far as it fits."""
    parts = _step_parts(message, total)
    for name in ("lr", "epoch", "speed", "loss"):
        text = "  ".join(parts.values()).removeprefix("step ")
        if len(text) <= width - _BAR_AND_CLOCK:
            return text
        parts.pop(name, None)
    return "  ".join(parts.values()).removeprefix("step ")


def _step_parts(message: Message, total: float) -> dict[str, str]:
    parts = {}
    step = number(message.get("step"))
    if math.isfinite(step):
        parts["step"] = f"step {step:.0f}" + (f"/{total:.0f}" if math.isfinite(total) else "")
    for key, name, text in (
        ("epoch", "epoch", "epoch {:.1f}"),
        ("loss", "loss", "loss {:.4f}"),
        ("learning_rate", "lr", "lr {:.3g}"),
    ):
        if isinstance(message.get(key), int | float):
            parts[name] = text.format(number(message[key]))
    rate = number(message.get("samples_per_second"))
    if math.isfinite(rate):
        parts["speed"] = f"{format_count(rate)} samples/s"
    return parts


def step_line(message: Message, total: float) -> str:
    """A step as one plain line, with the time left where it can be told."""
    parts = list(_step_parts(message, total).values())
    if (left := _seconds_left(message, total)) is not None:
        parts.append(f"{seconds_text(left)} left")
    return "  ".join(parts)


def _seconds_left(message: Message, total: float) -> float | None:
    """At the pace so far: seconds · (total − step) / step; exact only for a run from step 0."""
    step, seconds = number(message.get("step")), number(message.get("seconds"))
    left = seconds * (total - step) / step if step > 0 else math.nan
    return left if math.isfinite(left) and left > 0 else None


def line_of(message: Message, *, verbose: bool) -> str:
    """Any message but a step's as one plain line; empty for what is not shown."""
    kind = message.get("kind")
    if kind == "start":
        return _start_line(message)
    if kind == "evaluation":
        metrics = message.get("metrics")
        text = metrics_text(metrics) if isinstance(metrics, Mapping) else ""
        return f"evaluation{_at(message)}: {text}"
    if kind == "checkpoint" and verbose:
        return _checkpoint_line(message)
    if kind == "event" and message.get("detail") and not verbose:
        return ""
    if kind == "event":
        rank = number(message.get("rank"))
        who = f" (rank {rank:.0f})" if math.isfinite(rank) else ""
        text = f"{message.get('event', 'event')}{_at(message)}{who}: {message.get('message', '')}"
        return printable(text)
    return _end_line(message) if kind == "end" else ""


def _at(message: Message) -> str:
    step, epoch = number(message.get("step")), number(message.get("epoch"))
    found = [f"step {step:.0f}"] if math.isfinite(step) else []
    found += [f"epoch {epoch:.2f}"] if math.isfinite(epoch) else []
    return f" at {', '.join(found)}" if found else ""


def _start_line(message: Message) -> str:
    parts = [str(message.get("name") or "run")]
    if message.get("strategy"):
        parts.append(str(message["strategy"]))
    world = number(message.get("world_size"))
    if math.isfinite(world):
        device = f" on {message['device']}" if message.get("device") else ""
        parts.append(f"{world:.0f} rank{'s' if world != 1 else ''}{device}")
    for key, text in (
        ("parameters", "{} parameters"),
        ("total_steps", "{} steps"),
        ("batch_size", "batches of {}"),
    ):
        value = number(message.get(key))
        if math.isfinite(value):
            parts.append(text.format(format_count(value)))
    first = number(message.get("first_step"))
    if math.isfinite(first) and first > 0:
        parts.append(f"resumed at step {first:.0f}")
    return printable(" · ".join(parts))


def _checkpoint_line(message: Message) -> str:
    size, seconds = number(message.get("bytes")), number(message.get("seconds"))
    parts = [format_bytes(size)] if math.isfinite(size) else []
    parts += [f"in {seconds_text(seconds)}"] if math.isfinite(seconds) else []
    return f"checkpoint{_at(message)}: {' '.join(parts)}"


def _end_line(message: Message) -> str:
    metrics = message.get("metrics")
    parts = [metrics_text(metrics)] if isinstance(metrics, Mapping) and metrics else []
    seconds = number(message.get("seconds"))
    parts += [f"in {seconds_text(seconds)}"] if math.isfinite(seconds) else []
    reason = f" ({message['reason']})" if message.get("reason") else ""
    return printable(f"{message.get('state') or 'end'}{reason}: {', '.join(parts)}")
