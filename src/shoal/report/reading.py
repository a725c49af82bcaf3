"""The files of a run folder, read as far as they go.

    recipe.yaml  strategy.json  cluster.json  run.json     values; any may be missing
    metrics.jsonl  events.jsonl                            lines; the last may be half written

A report is wanted most for a run that went wrong, so nothing here raises for a damaged file: what
could not be read becomes one plain sentence in `RunDocuments.notes`.

    documents = read_run(Path("runs/digits-0007"))
    documents.training["loss"]                             # float64, one number a logged step
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from pydantic_core import from_json

from shoal.report.values import number

Column = npt.NDArray[np.float64]

# Bounds the memory of a long run's lines: they are turned into columns this many at a time.
_LINES_AT_A_TIME = 20_000
_FILES = (
    "recipe.yaml",
    "strategy.json",
    "cluster.json",
    "run.json",
    "metrics.jsonl",
    "events.jsonl",
)
TRAINING_COLUMNS = ("step", "epoch", "samples", "loss", "learning_rate", "seconds")
_RATE = "samples_per_second"


@dataclass(frozen=True)
class Evaluations:
    """What one metric was at each evaluation: columns of equal length."""

    step: Column
    seconds: Column
    value: Column


@dataclass(frozen=True)
class RunDocuments:
    """Everything a report says about a run; `notes` are the sentences about what is missing."""

    folder: Path
    recipe: Any
    strategy: Any
    cluster: Any
    summary: Mapping[str, Any]
    training: Mapping[str, Column]
    evaluations: Mapping[str, Evaluations]
    events: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]


def read_run(folder: Path) -> RunDocuments:
    """Read what there is of a run in ``folder``; damaged and missing files become notes."""
    notes: list[str] = []
    if missing := [name for name in _FILES if not (folder / name).exists()]:
        notes.append(f"Not written: {', '.join(missing)}.")
    summary = _read_value(folder / "run.json", notes)
    if summary is not None and not isinstance(summary, dict):
        notes.append("run.json holds no summary.")
    training, evaluations = _read_metrics(folder / "metrics.jsonl", notes)
    return RunDocuments(
        folder=folder,
        recipe=_read_value(folder / "recipe.yaml", notes),
        strategy=_read_value(folder / "strategy.json", notes),
        cluster=_read_value(folder / "cluster.json", notes),
        summary=summary if isinstance(summary, dict) else {},
        training=training,
        evaluations=evaluations,
        events=tuple(_read_lines(folder / "events.jsonl", notes)),
        notes=tuple(notes),
    )


def _read_value(path: Path, notes: list[str]) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            notes.append(f"{path.name} is empty.")
            return None
        return from_json(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        pass  # `read_run` names all missing files in one sentence
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged or half written"
        notes.append(f"{path.name} could not be read: {reason}.")
    return None


def _read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    damaged = 0
    try:
        with path.open("rb") as lines:
            for line in lines:
                row = _parse_line(line)
                if row is None:
                    damaged += bool(line.strip())
                else:
                    yield row
    except FileNotFoundError:
        pass  # `read_run` names all missing files in one sentence
    except OSError as error:
        notes.append(f"{path.name} could not be read: {error.strerror}.")
    if damaged:
        left_out = "1 line" if damaged == 1 else f"{damaged:,} lines"
        notes.append(f"{path.name}: {left_out} left out, damaged or half written.")


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        row = from_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _read_metrics(path: Path, notes: list[str]) -> tuple[dict[str, Column], dict[str, Evaluations]]:
    names = (*TRAINING_COLUMNS, _RATE)
    pieces: dict[str, list[Column]] = {name: [] for name in names}
    evaluated: list[dict[str, Any]] = []
    rows = _read_lines(path, notes)
    while chunk := list(islice(rows, _LINES_AT_A_TIME)):
        trained = [row for row in chunk if "evaluation" not in row]
        evaluated += [row for row in chunk if "evaluation" in row]
        for name in names:
            pieces[name].append(_column([row.get(name) for row in trained]))
    training = {name: np.concatenate([*pieces[name], np.empty(0)]) for name in names}
    return training, _by_metric(evaluated)


def _column(values: Sequence[object]) -> Column:
    if all(type(value) is float or type(value) is int for value in values):
        try:
            return np.array(values, dtype=np.float64)
        except OverflowError:
            pass  # a whole number beyond float64's range: `number` makes it NaN below
    return np.array([number(value) for value in values], dtype=np.float64)


def _by_metric(rows: Sequence[Mapping[str, Any]]) -> dict[str, Evaluations]:
    points: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        metrics = row["evaluation"]
        if not isinstance(metrics, dict):
            continue
        step, seconds = number(row.get("step")), number(row.get("seconds"))
        for name, value in metrics.items():
            points.setdefault(name, []).append((step, seconds, number(value)))
    return {name: Evaluations(*np.array(found).T) for name, found in points.items()}
