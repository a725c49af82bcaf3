"""The page of a run: whole, self-contained, and harmless whatever the run is called."""

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import DiskFull, RunFolderError
from shoal.report import page as page_module
from shoal.report import write_run_report
from shoal.report.charts import run_charts
from shoal.report.page import reproduce_command
from shoal.report.reading import read_run

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Collects elements, their attributes and texts; fails on a tag that is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.data: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            identity = self.elements[-1][1].get("id") or ""
            self.data[identity] = self.data.get(identity, "") + data
        elif data.strip():
            self.texts.append(" ".join(data.split()))

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def write_lines(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def training(step: int, **changed: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "epoch": step / 12,
        "samples": step * 128,
        "loss": 2.3 * math.exp(-step / 100),
        "learning_rate": 0.1,
        "seconds": step * 0.15,
        "samples_per_second": 850.0 + step % 7,
    }
    return {**row, **changed}


def evaluation(step: int, **metrics: float) -> dict[str, Any]:
    return {
        "step": step,
        "epoch": step / 12,
        "samples": step * 128,
        "seconds": step * 0.15,
        "evaluation": metrics,
    }


def make_run(parent: Path) -> Path:
    folder = parent / "digits-0007"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        "name: digits\nseed: 0\nbatch_size: 128\nmodel: {name: resnet, depth: 18}\n"
        "optimizer: {name: sgd, lr: 0.1, no_decay: [bias, norm]}\n"
    )
    (folder / "strategy.json").write_text('{"strategy": "dp2+bf16", "axes": {"dp": 2}}')
    (folder / "cluster.json").write_text(
        '{"name": "local", "device": {"memory_bytes": 8589934592}}'
    )
    rows = []
    for step in range(1, 121):
        rows.append(training(step))
        if step % 12 == 0:
            rows.append(evaluation(step, loss=2.0 / step, accuracy=1 - 0.5 / step))
    write_lines(folder / "metrics.jsonl", rows)
    events = [
        {"time": 1760000000.5, "event": "start", "message": "2 ranks", "rank": None, "step": 0},
        {"time": 1760000020, "event": "warning", "message": "slow disk", "rank": 1, "step": 40},
    ]
    write_lines(folder / "events.jsonl", events)
    summary = {
        "run": str(folder),
        "state": "done",
        "strategy": "dp2+bf16",
        "world_size": 2,
        "steps": 120,
        "samples": 15360,
        "seconds": 78.4,
        "samples_per_second": 853.2,
        "metrics": {"accuracy": 0.98331, "loss": 0.0612},
        "peak_memory_bytes": [412345678, 1288490188],
        "comm_bytes": {"all_reduce": {"gradient": [336000000, 336000000], "metric": [2880, 2880]}},
        "timings": {"step_s": {"forward": 0.05}},
        "versions": {"shoal": "0.1.0", "torch": "2.13.0"},
        "checkpoint": None,
        "resumed_from_step": None,
    }
    (folder / "run.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture
def chartless(run: Path) -> Path:
    """A run whose page needs no charts: what a test of the rest is fast with."""
    (run / "metrics.jsonl").write_text("")
    return run


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report: only to be read."""
    folder = make_run(tmp_path_factory.mktemp("healthy"))
    write_run_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(healthy: Path) -> Page:
    return Page((healthy / "report.html").read_text(encoding="utf-8"))


def change_summary(folder: Path, **changed: Any) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def report(folder: Path) -> Page:
    return Page(write_run_report(folder).read_text(encoding="utf-8"))


def charts_of(page: Page) -> dict[str, tuple[str, str]]:
    """Of each embedded chart: title → (x label, y label)."""
    found = {}
    for item in json.loads(page.data["chart-data"]):
        (figure,) = item["doc"]["roots"]
        attributes = figure["attributes"]
        labels = [
            attributes[side][0]["attributes"]["axis_label"]["attributes"]["text"]
            for side in ("below", "left")
        ]
        found[attributes["title"]["attributes"]["text"]["attributes"]["text"]] = (*labels,)
        assert attributes["sizing_mode"] == "stretch_width"
        tools = {tool["name"] for tool in attributes["toolbar"]["attributes"]["tools"]}
        assert {"HoverTool", "BoxZoomTool", "WheelZoomTool", "ResetTool"} <= tools
    return found


def test_every_chart_has_a_title_axes_units_hover_and_zoom(page: Page) -> None:
    steps, times = "optimizer step", "time since the start (s)"
    assert charts_of(page) == {
        "Loss by step": (steps, "loss (mean per example)"),
        "Loss by time": (times, "loss (mean per example)"),
        "Accuracy by step": (steps, "accuracy (%)"),
        "Accuracy by time": (times, "accuracy (%)"),
        "Learning rate by step": (steps, "learning rate (no unit)"),
        "Throughput by step": (steps, "throughput (samples/s)"),
    }


def test_headlines_and_values_are_in_human_units(healthy: Path, page: Page) -> None:
    for text in ("digits", "done", "98.33 %", "0.0612", "1 min 18 s", "853 samples/s", "2 ranks"):
        assert text in page.texts
    for text in ("1.2 GiB", "393 MiB", "all-reduce · gradient", "320 MiB", "2.81 KiB", "8 GiB"):
        assert text in page.texts
    for text in ("model.depth", "optimizer.no_decay", "bias, norm", "50 ms", "2.13.0"):
        assert text in page.texts
    assert "2025-10-09 08:53:40 UTC" in page.texts
    assert "rank 1, step 40" in page.texts
    assert f"shoal train {healthy}/recipe.yaml --strategy dp2+bf16" in page.texts


def test_nothing_is_loaded_from_anywhere(healthy: Path, page: Page) -> None:
    for tag, attributes in page.elements:
        assert "src" not in attributes, tag
        assert attributes.get("href", "data:,") == "data:,"
    style = page.data[""].split("/* BEGIN", 1)[0]
    assert "@import" not in style
    assert "url(" not in style
    (policy,) = [
        meta["content"]
        for meta in page.having("meta")
        if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert (healthy / "report.html").stat().st_size < 2_500_000
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.having(
        "meta"
    )
    assert "prefers-color-scheme: dark" in style


HOSTILE = "$$x$$</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7*7 }}"


def test_hostile_names_are_text_everywhere(run: Path) -> None:
    (run / "recipe.yaml").write_text(json.dumps({"name": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}}))
    (run / "strategy.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "cluster.json").write_text(json.dumps([HOSTILE, {HOSTILE: 1}]))
    write_lines(
        run / "metrics.jsonl",
        [training(1), evaluation(1, **{HOSTILE: 0.5}), evaluation(2, **{HOSTILE: 0.6})],
    )
    write_lines(
        run / "events.jsonl", [dict.fromkeys(("time", "event", "message", "phase"), HOSTILE)]
    )
    change_summary(
        run,
        state=HOSTILE,
        reason=HOSTILE,
        strategy=HOSTILE,
        comm_bytes={HOSTILE: {HOSTILE: [1]}},
        versions={HOSTILE: HOSTILE},
    )
    page = report(run)
    assert len(page.having("script")) == 3
    assert page.having("img") == []
    assert "49" not in page.texts
    assert page.text.count("<script>alert(1)</script>") > 10
    # A title between dollar signs must not become TeX: BokehJS would fetch MathJax for it.
    assert any("$$x$$" in title for title in charts_of(page))
    assert page.data["chart-data"].count("<") == 0


@pytest.mark.parametrize(
    "missing",
    ["recipe.yaml", "strategy.json", "cluster.json", "run.json", "metrics.jsonl", "events.jsonl"],
)
@pytest.mark.parametrize("content", [None, b"", b"\x00\xff{", b"[1, 2", b"7", b"- [{: a"])
def test_each_file_may_be_missing_empty_or_damaged(
    chartless: Path, missing: str, content: bytes | None
) -> None:
    if content is None:
        (chartless / missing).unlink()
    else:
        (chartless / missing).write_bytes(content)
    page = report(chartless)
    assert page.having("h1")
    if content != b"7" and not (content == b"" and missing.endswith("jsonl")):
        assert missing in page.text
    if missing == "metrics.jsonl":
        assert page.having("script") == []
        assert "There is no loss to draw: no training step was logged." in page.texts
        assert "There is no accuracy to draw: no evaluation was logged." in page.texts


def test_an_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    page = report(tmp_path)
    assert "no summary" in page.texts
    assert "Without recipe.yaml there is nothing to run again." in page.texts


@pytest.mark.parametrize("value", [None, "text", 3, [], [None, "x"], {}, {"a": None}, {"a": [[1]]}])
@pytest.mark.parametrize(
    "key", ["metrics", "peak_memory_bytes", "comm_bytes", "timings", "members", "seconds", "state"]
)
def test_any_key_of_the_summary_may_be_of_any_shape(chartless: Path, key: str, value: Any) -> None:
    change_summary(chartless, **{key: value})
    assert report(chartless).having("h1")


def test_a_half_written_last_line_is_left_out_and_said(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 121, "loss": 0.')
    documents = read_run(run)
    assert documents.training["step"][-1] == 120
    assert documents.notes == ("metrics.jsonl: 1 line left out, damaged or half written.",)


def test_a_failed_run_says_why(chartless: Path) -> None:
    write_lines(
        chartless / "events.jsonl", [{"event": "fault", "message": "rank 1 was killed", "rank": 1}]
    )
    change_summary(chartless, state="failed")
    page = report(chartless)
    assert "failed" in page.texts
    assert "rank 1 was killed" in page.texts
    change_summary(chartless, reason="the loss is NaN")
    assert "the loss is NaN" in report(chartless).texts


def test_a_loss_that_is_not_finite_breaks_the_line_and_is_said(run: Path) -> None:
    rows = [training(1), training(2, loss=math.inf), training(3, loss=None), training(4)]
    write_lines(run / "metrics.jsonl", rows)
    chart = run_charts(read_run(run))[0]
    (series,) = chart.series
    assert [math.isfinite(value) for value in series.y] == [True, False, False, True]
    assert chart.note == "2 not finite: the line breaks there."
    assert report(run).data["chart-data"]


def test_the_unit_of_the_time_axis_grows_with_the_run(run: Path) -> None:
    for seconds, label in ((100, "(s)"), (600, "(min)"), (20_000, "(h)")):
        write_lines(run / "metrics.jsonl", [training(1, seconds=0), training(2, seconds=seconds)])
        chart = run_charts(read_run(run))[1]
        assert chart.x_label == f"time since the start {label}"
        scale = {"(s)": 1, "(min)": 60, "(h)": 3600}[label]
        assert chart.series[0].x[-1] == pytest.approx(seconds / scale)


def test_a_hundred_thousand_lines_keep_their_extremes_in_time_and_size(run: Path) -> None:
    rows = [training(step) for step in range(1, 100_001)]
    rows[43_210]["loss"] = 17.5
    rows[77_777]["loss"] = -3.25
    rows[50_000]["samples_per_second"] = 1.0
    write_lines(run / "metrics.jsonl", rows)
    began = time.process_time()
    path = write_run_report(run)
    assert time.process_time() - began < 30
    assert path.stat().st_size < 2_500_000
    charts = run_charts(read_run(run))
    loss = charts[0]
    raw = loss.series[0]
    assert len(raw.x) <= 1600
    assert dict(zip(raw.x, raw.y, strict=True))[43_211] == 17.5
    assert raw.y.min() == -3.25
    assert (raw.x[0], raw.x[-1]) == (1, 100_000)
    assert re.match(r"100,000 values drawn as 1,\d+ points, minima and maxima kept", loss.note)
    assert charts[-1].series[0].y.min() == 1.0


def test_many_ranks_are_summed_up(chartless: Path) -> None:
    change_summary(chartless, peak_memory_bytes=[2**30 * (rank + 1) for rank in range(64)])
    page = report(chartless)
    for text in ("least", "mean", "most", "1 GiB", "32.5 GiB", "64 GiB"):
        assert text in page.texts


def test_aliases_cannot_make_a_page_of_any_size(chartless: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (chartless / "recipe.yaml").write_text("\n".join(lines) + "\nloop: &loop [*loop]\n")
    began = time.process_time()
    assert write_run_report(chartless).stat().st_size < 2_500_000
    assert time.process_time() - began < 30


def test_the_command_is_quoted_for_a_shell(chartless: Path) -> None:
    change_summary(chartless, strategy="dp2/x; rm -rf ~")
    assert reproduce_command(read_run(chartless)).endswith("--strategy 'dp2/x; rm -rf ~'")


def test_the_old_report_survives_a_full_disk(
    chartless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_run_report(chartless)
    old = path.read_bytes()

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page_module.Path, "replace", full)
    with pytest.raises(DiskFull, match="could not be written"):
        write_run_report(chartless)
    assert path.read_bytes() == old
    assert [one.name for one in chartless.glob(".report*")] == []


def test_no_folder_is_an_error_that_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="there is no run folder"):
        write_run_report(tmp_path / "none")
