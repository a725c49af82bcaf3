"""Charts of a run: what is drawn, as values, and how bokeh draws it.

    columns  →  Chart (title, axes with units, series)  →  JSON that the page's script embeds

A chart is a value first, so that what it says can be tested without a browser; a chart with
nothing to draw carries the sentence that stands in its place.

    charts = run_charts(documents)
    charts[0].title                     # 'Loss by step'
    item = to_json(charts[0], "chart-0")
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from shoal.report.decimate import Column, extremes, running_mean
from shoal.report.reading import Evaluations, RunDocuments

# Two points for each pixel column of the widest card of the page.
MAX_POINTS = 1600
# A mean over a hundredth of the run; drawn only where the line itself would be a smear.
_SMOOTH_FROM = 400
_MARK_UP_TO = 40
_SHARES = {"accuracy": "accuracy", "top5": "top-5 accuracy"}

# Mid tones, at least 3:1 against the light and the dark card alike (WCAG 2, 1.4.11).
_BLUE, _ORANGE, _GREEN, _VIOLET = "#3d85d8", "#d9722e", "#2c9c83", "#8b72d6"
_INK, _FAINT = "#7b8290", "rgba(128, 136, 150, 0.22)"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"


@dataclass(frozen=True)
class Series:
    """One line of a chart: x and y of equal length, already decimated, all x finite."""

    name: str
    x: Column
    y: Column
    color: str
    look: Literal["line", "faint", "mean", "marked"] = "line"


@dataclass(frozen=True)
class Chart:
    """A chart as a value. ``empty`` is the sentence shown instead where there are no series."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    empty: str
    note: str = ""
    from_zero: bool = False


@dataclass(frozen=True)
class _Axis:
    """What a column of x values is called, and how many of its units make one of the label's."""

    by: str
    label: str
    column: Literal["step", "seconds"]
    scale: float = 1.0


def run_charts(documents: RunDocuments) -> list[Chart]:
    """The charts of a run: loss and every metric by step and by time, learning rate, throughput."""
    steps = _Axis("step", "optimizer step", "step")
    times = _time_axis(documents)
    charts = [_loss_chart(documents, axis) for axis in (steps, times)]
    metrics = [name for name in documents.evaluations if name != "loss"]
    for name in metrics or ["accuracy"]:
        charts += [_metric_chart(documents, name, axis) for axis in (steps, times)]
    charts += [_learning_rate_chart(documents), _throughput_chart(documents)]
    return charts


def _time_axis(documents: RunDocuments) -> _Axis:
    columns = [documents.training["seconds"]]
    columns += [found.seconds for found in documents.evaluations.values()]
    known = np.concatenate(columns)
    longest = float(np.max(known[np.isfinite(known)], initial=0.0))
    for unit, seconds in (("h", 3600.0), ("min", 60.0)):
        if longest >= 3 * seconds:
            return _Axis("time", f"time since the start ({unit})", "seconds", seconds)
    return _Axis("time", "time since the start (s)", "seconds")


def _loss_chart(documents: RunDocuments, axis: _Axis) -> Chart:
    training = documents.training
    x, y = training[axis.column] / axis.scale, training["loss"]
    series, note = _smoothed("training", x, y, _BLUE)
    found = documents.evaluations.get("loss")
    if found is not None:
        series += _marked("evaluation", found, axis, 1.0, _ORANGE)
    return Chart(
        title=f"Loss by {axis.by}",
        x_label=axis.label,
        y_label="loss (mean per example)",
        series=tuple(series),
        empty="There is no loss to draw: no training step was logged.",
        note=note,
    )


def _smoothed(name: str, x: Column, y: Column, color: str) -> tuple[list[Series], str]:
    """The line itself and, for a long run, its running mean over it."""
    line, note = _line(name, x, y, color)
    if not line or len(y) < _SMOOTH_FROM:
        return line, note
    window = max(3, len(y) // 100) | 1
    mean, _ = _line(f"mean of {window:,}", x, running_mean(y, window), color)
    return [replace(line[0], look="faint"), *(replace(one, look="mean") for one in mean)], note


def _metric_chart(documents: RunDocuments, name: str, axis: _Axis) -> Chart:
    called = _SHARES.get(name, name if len(name) <= 40 else f"{name[:39]}…")
    found = documents.evaluations.get(name)
    scale = 100.0 if name in _SHARES else 1.0
    return Chart(
        title=f"{called[:1].upper()}{called[1:]} by {axis.by}",
        x_label=axis.label,
        y_label=f"{called} (%)" if name in _SHARES else f"{called} (its own unit)",
        series=tuple(_marked("evaluation", found, axis, scale, _ORANGE)) if found else (),
        empty=f"There is no {called} to draw: no evaluation was logged.",
    )


def _learning_rate_chart(documents: RunDocuments) -> Chart:
    training = documents.training
    line, note = _line("learning rate", training["step"], training["learning_rate"], _GREEN)
    return Chart(
        title="Learning rate by step",
        x_label="optimizer step",
        y_label="learning rate (no unit)",
        series=tuple(line),
        empty="There is no learning rate to draw: no training step was logged.",
        note=note,
        from_zero=True,
    )


def _throughput_chart(documents: RunDocuments) -> Chart:
    training = documents.training
    speeds = training["samples_per_second"]
    series, note = _smoothed("throughput", training["step"], speeds, _VIOLET)
    return Chart(
        title="Throughput by step",
        x_label="optimizer step",
        y_label="throughput (samples/s)",
        series=tuple(series),
        empty="There is no throughput to draw: no training step was logged.",
        note=note,
        from_zero=True,
    )


def _marked(name: str, found: Evaluations, axis: _Axis, scale: float, color: str) -> list[Series]:
    x = (found.step if axis.column == "step" else found.seconds) / axis.scale
    line, _ = _line(name, x, found.value * scale, color)
    look: Literal["line", "marked"] = "marked" if line and len(line[0].x) <= _MARK_UP_TO else "line"
    return [replace(one, look=look) for one in line]


def _line(name: str, x: Column, y: Column, color: str) -> tuple[list[Series], str]:
    """A decimated series, or none if no point of it can be drawn; and a note on what was left."""
    placed = np.isfinite(x)
    x, y = x[placed], y[placed]
    finite = np.isfinite(y)
    if not finite.any():
        return [], ""
    kept = extremes(np.where(finite, y, math.nan), MAX_POINTS)
    notes = []
    if len(kept) < len(x):
        notes.append(f"{len(x):,} values drawn as {len(kept):,} points, minima and maxima kept.")
    if missing := int(len(y) - finite.sum()):
        notes.append(f"{missing:,} not finite: the line breaks there.")
    shown = np.where(finite, y, math.nan)[kept]
    return [Series(name, x[kept], shown, color)], " ".join(notes)


def to_json(chart: Chart, target: str) -> Mapping[str, Any]:
    """The chart as the JSON item that BokehJS embeds into the element with id ``target``."""
    from bokeh.core.types import ID
    from bokeh.embed import json_item
    from bokeh.models import DataRange1d, PlainText
    from bokeh.models.annotations import Title
    from bokeh.plotting import figure

    figure_ = figure(
        height=300,
        sizing_mode="stretch_width",
        toolbar_location="above",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag="box_zoom",
        active_scroll=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_left=8,
    )
    # Plain text: a string would be read as TeX between dollar signs, and MathJax fetched for it.
    figure_.title = Title(text=PlainText(text=chart.title))
    figure_.xaxis.axis_label = PlainText(text=chart.x_label)
    figure_.yaxis.axis_label = PlainText(text=chart.y_label)
    if chart.from_zero:
        figure_.y_range = DataRange1d(start=0)
    _draw(figure_, chart)
    _style(figure_)
    if len(chart.series) > 1:
        _style_legend(figure_.legend, "bottom_right" if chart.from_zero else "top_right")
    item: Mapping[str, Any] = json_item(figure_, ID(target))
    return item


def _draw(figure_: Any, chart: Chart) -> None:
    from bokeh.models import ColumnDataSource

    for one in chart.series:
        source = ColumnDataSource({"x": one.x, "y": one.y})
        legend = {"legend_label": one.name} if len(chart.series) > 1 else {}
        line = figure_.line(
            "x",
            "y",
            source=source,
            color=one.color,
            line_width=1 if one.look == "faint" else 2,
            line_alpha=0.3 if one.look == "faint" else 1.0,
            line_join="round",
            **legend,
        )
        if one.look == "marked":
            figure_.scatter("x", "y", source=source, color=one.color, size=6, **legend)
        if one.look != "mean":
            figure_.add_tools(_hover(chart, one, line))


def _hover(chart: Chart, one: Series, line: Any) -> Any:
    from bokeh.models import HoverTool

    steps = chart.x_label == "optimizer step"
    rate = chart.y_label.endswith("(samples/s)")
    several = len(chart.series) > 1
    return HoverTool(
        renderers=[line],
        tooltips=[
            (_literal(chart.x_label), "@x{0,0}" if steps else "@x{0,0.00}"),
            (_literal(one.name if several else chart.y_label), "@y" + _y_format(rate)),
        ],
        mode="vline",
        line_policy="nearest",
        point_policy="snap_to_data",
        # The evaluation's below its line, the other's above: so both can be read.
        attachment="below" if one is chart.series[-1] and several else "above",
        visible=False,
    )


def _y_format(rate: bool) -> str:
    return "{0,0.0}" if rate else "{0.[000000]}"


def _literal(text: str) -> str:
    """``text`` without the signs that a tooltip would take for a placeholder."""
    return text.replace("@", "(at)").replace("$", "")


def _style(figure_: Any) -> None:
    from bokeh.models import NumeralTickFormatter

    figure_.toolbar.logo = None
    figure_.toolbar.autohide = True
    figure_.title.text_font = _FONT
    figure_.title.text_font_size = "15px"
    figure_.title.text_font_style = "bold"
    figure_.title.text_color = _INK
    figure_.title.standoff = 12
    figure_.xaxis.formatter = NumeralTickFormatter(format="0,0.[00]")
    for axis in figure_.axis:
        axis.axis_label_text_font = axis.major_label_text_font = _FONT
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.axis_label_text_color = axis.major_label_text_color = _INK
        axis.axis_line_color = axis.major_tick_line_color = _FAINT
        axis.minor_tick_line_color = None
    figure_.grid.grid_line_color = _FAINT
    figure_.xgrid.grid_line_color = None


def _style_legend(legend: Any, location: str) -> None:
    legend.location = location
    legend.click_policy = "hide"
    legend.label_text_font = _FONT
    legend.label_text_font_size = "12px"
    legend.label_text_color = _INK
    legend.background_fill_alpha = 0.0
    legend.border_line_color = None
