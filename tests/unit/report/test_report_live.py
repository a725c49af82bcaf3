"""The live view, plain and on a terminal, the error screen and the closing lines."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import NotFinite, Problem, RecipeError, UsageError, UserCodeError
from shoal.report import live, show_error, summary_lines
from shoal.report.live import PlainView, TerminalView, status

START = {
    "kind": "start",
    "name": "digits",
    "strategy": "dp2",
    "world_size": 2,
    "total_steps": 400,
    "steps_per_epoch": 20,
    "batch_size": 128,
    "first_step": 0,
    "parameters": 712345,
    "device": "cpu",
}
END = {"kind": "end", "state": "done", "metrics": {"accuracy": 0.98}, "seconds": 60.0}


def step(number: int, seconds: float = 1.0) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "epoch": number / 20,
        "loss": 0.5,
        "learning_rate": 0.05,
        "samples_per_second": 1234.5,
        "seconds": seconds,
    }


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_run(seconds: float, steps: int, *, verbose: bool = False) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with PlainView(stream, verbose=verbose, clock=clock) as view:
        view.show({**START, "total_steps": steps})
        for number in range(1, steps + 1):
            clock.now = seconds * number / steps
            view.show(step(number, clock.now))
        view.show(END)
    return stream.getvalue().splitlines()


def test_a_minute_prints_about_ten_lines() -> None:
    lines = plain_run(60, 400)
    assert 10 <= len(lines) <= 20
    assert lines[0] == (
        "digits · dp2 · 2 ranks on cpu · 712,345 parameters · 400 steps · batches of 128"
    )
    assert lines[1].startswith("step 1/400  epoch 0.1  loss 0.5000  lr 0.05  1,234 samples/s")
    assert lines[-1] == "done: accuracy 98.00 %, in 1 min 00 s"


def test_a_short_run_prints_its_first_step_only_and_a_long_one_is_never_silent() -> None:
    assert len(plain_run(4, 400)) == 3
    lines = plain_run(36_000, 4000)
    assert 36_000 / 300 <= len(lines) <= 36_000 / 300 + 20
    assert len(plain_run(60, 400, verbose=True)) == 402


def test_the_time_left_is_told() -> None:
    lines = plain_run(60, 400)
    assert lines[2].endswith(" left")
    assert "53.8 s left" in lines[2]


def test_evaluations_events_and_verbose_checkpoints() -> None:
    messages = [
        {"kind": "evaluation", "step": 20, "epoch": 1.0, "metrics": {"accuracy": 0.5, "f1": 0.25}},
        {"kind": "event", "event": "fault", "message": "rank lost", "rank": 1, "step": 21},
        {"kind": "checkpoint", "step": 20, "seconds": 0.05, "bytes": 3 * 2**20},
        {"kind": "weather", "message": "rain"},
        {},
    ]
    for verbose in (False, True):
        stream = io.StringIO()
        with live.view(stream, verbose=verbose) as view:
            for message in messages:
                view.show(message)
        lines = stream.getvalue().splitlines()
        assert lines[:2] == [
            "evaluation at step 20, epoch 1.00: accuracy 50.00 %, f1 0.25",
            "fault at step 21 (rank 1): rank lost",
        ]
        assert lines[2:] == (["checkpoint at step 20: 3 MiB in 50 ms"] if verbose else [])


@pytest.mark.parametrize("terminal", [False, True])
def test_messages_without_their_keys_are_shown_as_far_as_they_go(terminal: bool) -> None:
    stream = io.StringIO()
    with live.view(stream, terminal=terminal) as view:
        for kind in ("step", "start", "step", "evaluation", "checkpoint", "event", "end"):
            view.show({"kind": kind})
            view.show({"kind": kind, "step": None, "loss": "x", "metrics": 3, "total_steps": "?"})


@pytest.mark.parametrize("terminal", [False, True])
def test_users_strings_are_neither_markup_nor_escapes(terminal: bool) -> None:
    stream = io.StringIO()
    with live.view(stream, terminal=terminal) as view:
        view.show({**START, "name": "[red]x[/red][/oops]"})
        view.show({"kind": "event", "event": "warning", "message": "[bold]a[/bold]\x1b[2Jb"})
        view.show({**END, "reason": "[link=x]why[/]"})
    text = stream.getvalue()
    assert "[red]x[/red][/oops]" in text
    assert "[bold]a[/bold]�[2Jb" in text
    assert "[link=x]why[/]" in text
    assert "\x1b[2J" not in text


def terminal_run(monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stream = io.StringIO()
    with live.view(stream, terminal=True) as view:
        assert isinstance(view, TerminalView)
        view.show(START)
        view.show(step(200))
        view.show({"kind": "evaluation", "step": 200, "epoch": 10, "metrics": {"accuracy": 0.9}})
        view.show(END)
    return stream.getvalue()


def test_a_terminal_shows_a_bar_and_what_scrolls_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = terminal_run(monkeypatch, 100)
    assert "200/400  epoch 10.0  loss 0.5000  lr 0.05  1,234 samples/s" in text
    assert "━" in text
    assert "evaluation at step 200, epoch 10.00: accuracy 90.00 %" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120])
def test_the_bar_keeps_to_its_line(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    assert len(status(step(200), 400, columns)) <= max(columns - 16, 7)
    assert "200/400" in terminal_run(monkeypatch, columns)


def test_an_interrupt_gives_the_terminal_back() -> None:
    stream, error_stream = io.StringIO(), sys.stderr

    def interrupted() -> None:
        with live.view(stream, terminal=True) as view:
            view.show(START)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = stream.getvalue()
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert sys.stderr is error_stream


def test_everything_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    for terminal in (None, True):
        with live.view(terminal=terminal) as view:
            view.show(START)
            view.show(END)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "digits" in captured.err


def shown(error: Any, *, debug: bool = False) -> list[str]:
    stream = io.StringIO()
    show_error(error, stream, debug)
    return stream.getvalue().splitlines()


def test_an_error_is_where_what_and_hint() -> None:
    error = NotFinite("the loss is NaN", hint="lower [optimizer.lr]", rank=1, step=40)
    assert shown(error.located(phase="backward")) == [
        "error: rank 1, step 40, backward: the loss is NaN",
        "hint: lower [optimizer.lr]",
    ]
    assert shown(UsageError("no such file [/red]")) == ["error: no such file [/red]"]


def test_tracebacks_need_debug() -> None:
    error = UserCodeError("KeyError: 'x'", rank=0)
    error.traceback = "Traceback (most recent call last):\n  model.py, line 3"
    assert not any("model.py" in line for line in shown(error))
    assert "(the traceback is shown with --debug)" in shown(error)
    assert "  model.py, line 3" in shown(error, debug=True)
    with pytest.raises(UsageError) as raised:
        raise UsageError("planted")
    assert any(line.startswith("Traceback") for line in shown(raised.value, debug=True))


def test_an_error_fits_on_a_screen_unless_debug() -> None:
    error = RecipeError([Problem(f"key{i}", "is unknown", "r.yaml", i) for i in range(100)])
    lines = shown(error)
    assert len(lines) <= 20
    assert lines[0] == "error: r.yaml:0: key0: is unknown"
    assert lines[-1] == "  … and 84 more lines (all of them with --debug)"
    assert any("key99" in line for line in shown(error, debug=True))


def test_long_lines_are_not_broken() -> None:
    assert shown(UsageError("x" * 500)) == [f"error: {'x' * 500}"]


def test_summary_lines_of_a_run_that_ended(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("")
    summary = {
        "run": str(tmp_path),
        "state": "done",
        "strategy": "dp2",
        "world_size": 2,
        "steps": 240,
        "seconds": 42.13,
        "samples_per_second": 853.2,
        "metrics": {"accuracy": 0.9833, "loss": 0.0612},
        "checkpoint": "x",
    }
    assert summary_lines(summary).splitlines() == [
        "done after 240 steps: accuracy 98.33 %, loss 0.0612",
        "42.1 s, 853 samples/s, on 2 ranks (dp2)",
        f"run     {tmp_path}",
        f"report  {tmp_path}/report.html",
    ]


def test_summary_lines_of_a_run_that_stopped_say_how_to_resume() -> None:
    summary = {"run": "runs/a b", "state": "stopped", "strategy": "dp2/zero1", "checkpoint": "x"}
    assert summary_lines(summary).splitlines()[-1] == (
        "resume  shoal train 'runs/a b/recipe.yaml' --strategy dp2/zero1 --out 'runs/a b' --resume"
    )
    assert "resume" not in summary_lines({**summary, "checkpoint": None})
    assert summary_lines({}) == "ended"
