"""The page of a run: one file that needs no network, for a phone as for a wide screen.

    run folder  →  RunDocuments  →  charts and tables  →  report.html
    (reading)                       (charts, values)      (page.html, page.css, page.js)

Names and texts of a run are untrusted: the template escapes all of them, chart data travel as JSON
that no tag can end, and the page's own policy lets only the two scripts run whose digests it
names, and fetches nothing.

    write_page(Path("runs/digits-0007"))                   # runs/digits-0007/report.html
"""

import base64
import errno
import hashlib
import json
import math
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import DiskFull, RunFolderError
from shoal.report.charts import Chart, run_charts, to_json
from shoal.report.reading import RunDocuments, read_run
from shoal.report.staleness import staleness_rows
from shoal.report.values import Row, moment_text, number, rank_table, rows, seconds_text, text_of
from shoal.units import format_count
from shoal.version import __version__

if TYPE_CHECKING:
    from jinja2 import Template

_MAX_EVENTS = 300
# Keys of run.json with a place of their own on the page; the others are listed under "Run".
_PLACED = {
    "peak_memory_bytes",
    "comm_bytes",
    "timings",
    "versions",
    "members",
    "metrics",
    "staleness",
}
_STATES = {"done": "good", "stopped": "fair", "failed": "bad"}


@dataclass(frozen=True)
class Headline:
    """One number of the page's first line, with its unit in ``value``."""

    label: str
    value: str
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A card of named values."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class EventLine:
    """One event as the page lists it."""

    moment: str
    kind: str
    where: str
    message: str


def write_page(folder: Path) -> Path:
    """What `shoal.report.write_run_report` does."""
    if not folder.is_dir():
        raise RunFolderError(
            f"there is no run folder {str(folder)!r} to report on",
            hint="give the folder that `shoal train` printed: it holds recipe.yaml and run.json",
        )
    path = folder / "report.html"
    page = render_run(read_run(folder)).encode("utf-8", errors="replace")
    try:
        _replace(path, page)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = DiskFull if full else RunFolderError
        raise kind(
            f"{path} could not be written: {error.strerror}",
            hint="free some space" if full else "make the folder writable",
        ) from error
    return path


def render_run(documents: RunDocuments) -> str:
    """The whole page of a run as one HTML text."""
    from markupsafe import Markup

    charts = run_charts(documents)
    drawn = [(f"chart-{index}", chart) for index, chart in enumerate(charts) if chart.series]
    scripts = [_bokeh_script(), _asset("page.js")] if drawn else []
    return _template().render(
        **_context(documents, charts),
        policy=_policy(scripts),
        # Marked as safe: our own files, and JSON in which no tag can begin.
        style=Markup(_asset("page.css")),
        scripts=[Markup(script) for script in scripts],
        chart_data=Markup(_embedded([to_json(chart, key) for key, chart in drawn])),
    )


@lru_cache(maxsize=1)
def _template() -> "Template":
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_asset),
    )
    return environment.get_template("page.html")


def _context(documents: RunDocuments, charts: Sequence[Chart]) -> dict[str, Any]:
    state = str(documents.summary.get("state") or "no summary")
    return {
        "name": run_name(documents),
        "state": state,
        "tone": _STATES.get(state, "none"),
        "reason": _reason(documents),
        "headlines": _headlines(documents),
        "charts": charts,
        "tables": _tables(documents),
        "memory": rank_table(
            [("peak memory", documents.summary.get("peak_memory_bytes") or [])], "memory"
        ),
        "communication": rank_table(_communication(documents), "collective · purpose"),
        "events": _events(documents),
        "events_before": max(0, len(documents.events) - _MAX_EVENTS),
        "notes": documents.notes,
        "command": reproduce_command(documents),
        "version": __version__,
    }


def run_name(documents: RunDocuments) -> str:
    """The recipe's name if it has one, else the folder's."""
    recipe = documents.recipe
    name = recipe.get("name") if isinstance(recipe, Mapping) else None
    return text_of(name) if name else documents.folder.resolve().name


def strategy_name(documents: RunDocuments) -> str | None:
    """The resolved strategy in its notation, from the summary or else strategy.json."""
    given = documents.strategy
    inner = given.get("strategy") if isinstance(given, Mapping) else given
    for value in (documents.summary.get("strategy"), inner):
        if isinstance(value, str) and value:
            return value
    return None


def reproduce_command(documents: RunDocuments) -> str:
    """The command line that runs the same recipe with the same strategy; empty without one."""
    if documents.recipe is None:
        return ""
    words = ["shoal", "train", str(documents.folder / "recipe.yaml")]
    if strategy := strategy_name(documents):
        words += ["--strategy", strategy]
    return shlex.join(words)


def _reason(documents: RunDocuments) -> str:
    if documents.summary.get("reason"):
        return text_of(documents.summary["reason"])
    if not documents.summary:
        return "The run has written no summary: it is still going on, or was cut off."
    if documents.summary.get("state") == "failed":
        faults = [event for event in documents.events if event.get("event") == "fault"]
        return text_of(faults[-1].get("message")) if faults else ""
    return ""


def _headlines(documents: RunDocuments) -> list[Headline]:
    summary = documents.summary
    given = summary.get("metrics")
    metrics = given if isinstance(given, Mapping) else {}
    found = []
    for name, label in (("accuracy", "accuracy"), ("top5", "top-5 accuracy")):
        value = _last(metrics, documents, name)
        if math.isfinite(value):
            found.append(Headline(label, f"{value:.2%}".replace("%", " %")))
    loss, of = _last(metrics, documents, "loss"), "evaluation loss"
    if not math.isfinite(loss):
        loss, of = _final(documents.training["loss"]), "training loss"
    if math.isfinite(loss):
        found.append(Headline(of, f"{loss:.4g}"))
    found += _speeds(documents)
    world = number(summary.get("world_size"))
    if math.isfinite(world):
        found.append(Headline("world size", f"{world:g} rank{'s' if world != 1 else ''}"))
    if strategy := strategy_name(documents):
        found.append(Headline("strategy", strategy, code=True))
    return found


def _speeds(documents: RunDocuments) -> list[Headline]:
    summary, training = documents.summary, documents.training
    found = []
    for key, label in (("seconds", "time"), ("samples_per_second", "throughput")):
        value = number(summary.get(key))
        if not math.isfinite(value):
            value = _final(training[key])
        if math.isfinite(value):
            text = seconds_text(value) if key == "seconds" else f"{format_count(value)} samples/s"
            found.append(Headline(label, text))
    return found


def _last(metrics: Mapping[str, Any], documents: RunDocuments, name: str) -> float:
    value = number(metrics.get(name))
    if not math.isfinite(value) and name in documents.evaluations:
        value = _final(documents.evaluations[name].value)
    return value


def _final(column: Any) -> float:
    return float(column[-1]) if len(column) else math.nan


def _tables(documents: RunDocuments) -> list[Table]:
    summary = documents.summary
    shown = {
        "Recipe": documents.recipe,
        "Run": {key: value for key, value in summary.items() if key not in _PLACED},
        "Final metrics": summary.get("metrics"),
        "Strategy": documents.strategy,
        "Cluster": documents.cluster,
        "Timings": summary.get("timings"),
        "Members": summary.get("members"),
        "Versions": summary.get("versions"),
    }
    tables = [Table(title, tuple(rows(value))) for title, value in shown.items() if value]
    staleness = staleness_rows(summary)
    return [*tables, Table("Staleness", tuple(staleness))] if staleness else tables


def _communication(documents: RunDocuments) -> list[tuple[str, Any]]:
    given = documents.summary.get("comm_bytes")
    if not isinstance(given, Mapping):
        return []
    return [
        (f"{collective.replace('_', '-')} · {purpose}", ranks)
        for collective, purposes in given.items()
        if isinstance(purposes, Mapping)
        for purpose, ranks in purposes.items()
    ]


def _events(documents: RunDocuments) -> list[EventLine]:
    return [_event(event) for event in documents.events[-_MAX_EVENTS:]]


def _event(event: Mapping[str, Any]) -> EventLine:
    places = [
        f"{name} {text_of(event[name])}" for name in ("rank", "step") if event.get(name) is not None
    ]
    if event.get("phase"):
        places.append(text_of(event["phase"]))
    return EventLine(
        moment=moment_text(event.get("time")),
        kind=text_of(event.get("event") or "event"),
        where=", ".join(places),
        message=text_of(event.get("message") or ""),
    )


def _asset(name: str) -> str:
    return files("shoal.report").joinpath(name).read_text(encoding="utf-8")


def _bokeh_script() -> str:
    from bokeh.resources import Resources

    # The core bundle alone: widgets, tables, WebGL and MathJax would add 2.6 MB.
    return str(Resources(mode="inline", components=["bokeh"]).js_raw[0])


def _embedded(items: Sequence[Mapping[str, Any]]) -> str:
    """JSON that can stand inside a script element: nothing in it can close the element."""
    return json.dumps(items, separators=(",", ":")).replace("<", "\\u003c")


def _policy(scripts: Sequence[str]) -> str:
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    allowed = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in digests)
    sources = allowed or "'none'"
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _replace(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=".report-", suffix=".html", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
