"""Every way to predict with some members, side by side on examples that none was chosen on.

each member · the mean member · best · mean · greedy-soup · matched-mean · ensemble
    accuracy, negative log likelihood, calibration error (95 %), forward passes, seconds
the loss along the line from the first member to each other, as they are and matched
a recommendation, made on the selection tenth

compare_with(open_runs(["runs/digits-0001"]), Options()).text()
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal import report
from shoal.data import Feed
from shoal.errors import Refused, UsageError
from shoal.predict.bench import Bench, answers
from shoal.predict.choosing import BARRIER, HOWS, How, Made, barrier, make_one, matched
from shoal.predict.front import Options, check_classes
from shoal.predict.inputs import Spec, asked_for, evaluation_of, labels_by
from shoal.predict.members import members_of
from shoal.predict.scores import Floats, Scores, interval, resampled
from shoal.run import Run

MEAN_MEMBER = "mean member"
MAX_LINES = 4  # members that the first is joined to: each costs six evaluations


@dataclass(frozen=True)
class Compared:
    """The contract's document of ``--compare``."""

    document: dict[str, Any]

    def text(self) -> str:
        """A table and the recommendation, for a terminal."""
        lines = [f"{'':<16} accuracy                nll      calibration  passes"]
        for row in self.document["compared"]:
            if row["error"] is not None:
                lines.append(f"{row['name']:<16} {row['error']}")
                continue
            low, high = row["intervals"]["accuracy"]
            right, nll, gap = row["metrics"].values()
            lines.append(
                f"{row['name']:<16} {right:.4f} [{low:.4f}, {high:.4f}] "
                f"{nll:.4f}   {gap:.4f}       "
                f"{row['forward_passes']}"
            )
        lines += [f"note: {note}" for note in self.document["notes"]]
        return "\n".join(
            [*lines, self.document["recommendation"], f"page    {self.document['out']}"]
        )


@dataclass(frozen=True)
class _Row:
    """One way: what it scores on the evaluated examples and on the selection tenth."""

    name: str
    scores: Scores | None
    selection: Scores | None = None
    forward_passes: int = 1
    seconds: float = 0.0
    used: tuple[str, ...] = ()
    error: str | None = None


def compare_with(runs: Sequence[Run], options: Options) -> Compared:
    """Judge every way; write the page and the document beside it.

    Raises `UsageError` for a single model, and for data without labels.
    """
    if options.how is not None or options.strategy != "single":
        raise UsageError(
            "--compare judges every way, on one device",
            hint="Leave out --how and --strategy.",
        )
    found = members_of(runs, skip_damaged=options.skip_damaged)
    if len(found.members) < 2:
        raise UsageError("--compare needs several models, and there is one")
    classes = check_classes(found.members)
    bench = Bench(found.members)
    spec = (
        evaluation_of(found.members[0].recipe) if options.data is None else asked_for(options.data)
    )
    feeds = _Feeds(bench, spec, classes)
    rows, notes = _rows(bench, feeds)
    lines, warned = _lines(bench)
    chosen, why = _recommended(rows)
    document: dict[str, Any] = {
        "how": chosen,
        "members": len(bench),
        "metrics": next(row.scores.metrics() for row in rows if row.name == chosen and row.scores),
        "examples": feeds.first.examples,
        "compared": _documents(rows),
        "barriers": lines,
        "recommendation": why,
        "notes": [*found.notes, *notes, *warned],
        "out": str(options.out or runs[0].path / "predict.html"),
    }
    page = Path(document["out"])
    report.write_prediction_page(page, document)
    page.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return Compared(document)


class _Feeds:
    """The evaluated examples as each member's recipe reads them."""

    def __init__(self, bench: Bench, spec: Spec, classes: tuple[str, ...] | None) -> None:
        opened: dict[str, Feed] = {}
        for member in bench.members:
            if member.run not in opened:
                size = bench.members[0].recipe.batch_size
                opened[member.run] = spec.open(member.recipe, size)
        self.of = [opened[member.run] for member in bench.members]
        self.first = self.of[0]
        known, why = labels_by(classes, self.first.classes)
        self.labels = known
        if spec.loose or why is not None:
            raise UsageError(
                f"{spec.source} has no labels to compare with{f': {why}' if why else ''}",
                hint="Give data with the classes that were trained on.",
            )


def _rows(bench: Bench, feeds: _Feeds) -> tuple[list[_Row], list[str]]:
    rows, notes, device = [], [], bench.device
    models = [bench.model(number) for number in range(len(bench))]
    for number, member in enumerate(bench.members):
        scores, seconds = _timed([models[number]], [feeds.of[number]], feeds, device)
        rows.append(_Row(member.name, scores, bench.scores(number), 1, seconds, (member.name,)))
    for how in HOWS:
        if how == "ensemble":
            continue
        try:
            made = make_one(how, bench)
        except Refused as error:
            rows.append(_Row(how, None, error=error.message))
            continue
        notes += [note for note in made.notes if note not in notes]
        rows.append(_made_row(how, made, bench, feeds))
    scores, seconds = _timed(models, feeds.of, feeds, device)
    selections = [bench.setting(number).selection for number in range(len(bench))]
    chosen_on, _ = _timed(models, selections, None, device)
    names = tuple(member.name for member in bench.members)
    rows.append(_Row("ensemble", scores, chosen_on, len(models), seconds, names))
    return rows, notes


def _made_row(how: How, made: Made, bench: Bench, feeds: _Feeds) -> _Row:
    if made.state is None:
        number = made.used[0]
        model, feed, selection = bench.model(number), feeds.of[number], bench.scores(number)
    else:
        model, feed, selection = (
            bench.model_of(made.state),
            feeds.first,
            bench.scores_of(made.state),
        )
    scores, seconds = _timed([model], [feed], feeds, bench.device)
    return _Row(how, scores, selection, 1, seconds, tuple(bench.members[n].name for n in made.used))


def _timed(
    models: Sequence[nn.Module],
    feeds: Sequence[Feed],
    about: _Feeds | None,
    device: torch.device,
) -> tuple[Scores, float]:
    """Scores of the mean of the models' probabilities, and the seconds that it took."""
    began, parts = time.perf_counter(), []
    each = [answers(model, feed, device) for model, feed in zip(models, feeds, strict=True)]
    for answered in zip(*each, strict=True):
        labels = answered[0][1].numpy()
        if about is not None and about.labels is not None:
            labels = about.labels[labels]
        mean = sum(probabilities.numpy() for probabilities, _ in answered) / len(answered)
        parts.append(Scores.of(mean, labels))
    return Scores.joined(parts), time.perf_counter() - began


def _lines(bench: Bench) -> tuple[list[dict[str, Any]], list[str]]:
    """The barrier from the first member to the others; as they are, and matched."""
    try:
        states = bench.states()
    except Refused as error:
        return [], [f"no line joins the members: {error.message}"]
    try:
        aligned = matched(bench, states)
    except Refused as error:
        aligned, notes = None, [f"matched-mean: {error.message}"]
    else:
        notes = []
    lines = []
    for number in range(1, min(len(bench), MAX_LINES + 1)):
        line: dict[str, Any] = {
            "from": bench.members[0].name,
            "to": bench.members[number].name,
            "barrier": barrier(bench, states[0], states[number]),
            "matched": None if aligned is None else barrier(bench, states[0], aligned[number]),
        }
        lines.append(line)
    highest = max(line["barrier"] for line in lines)
    if highest > BARRIER:
        notes.append(
            f"the loss rises {highest:.3g} nats above the line between members: they lie in "
            "different basins (independent starts, or long apart), and their plain average is not "
            "to be trusted"
        )
    return lines, notes


def _recommended(rows: Sequence[_Row]) -> tuple[str, str]:
    """(how, why): by what the selection tenth says, and what it costs."""
    judged = {row.name: row for row in rows if row.name in HOWS and row.selection is not None}
    ensemble = judged.pop("ensemble")
    one = max(judged.values(), key=lambda row: row.selection.rank)  # type: ignore[union-attr]
    assert one.selection is not None
    assert ensemble.selection is not None
    said = (
        f"{one.selection.accuracy:.2%} of the selection tenth right with {one.name}, "
        f"{ensemble.selection.accuracy:.2%} with the ensemble, which costs "
        f"{ensemble.forward_passes} forward passes an example"
    )
    if ensemble.selection.rank > one.selection.rank:
        return "ensemble", (f"recommended: ensemble ({said}); where one pass must do, {one.name}")
    return one.name, f"recommended: {one.name} ({said})"


def _documents(rows: Sequence[_Row]) -> list[dict[str, Any]]:
    """Each row with its intervals, and the mean member after the members."""
    scored = {row.name: row.scores for row in rows if row.scores is not None}
    drawn = resampled(scored)
    members = [row for row in rows if row.name not in HOWS]
    documents = [_document(row, drawn.get(row.name), drawn["ensemble"]) for row in rows]
    mean = _mean_member(members, drawn)
    return [*documents[: len(members)], mean, *documents[len(members) :]]


def _mean_member(members: Sequence[_Row], drawn: dict[str, dict[str, Floats]]) -> dict[str, Any]:
    """What a member is worth on average, and the interval of that."""
    of = [row.scores.metrics() for row in members if row.scores is not None]
    values = {key: _mean([drawn[row.name][key] for row in members]) for key in of[0]}
    return {
        "name": MEAN_MEMBER,
        "metrics": {key: float(np.mean([each[key] for each in of])) for key in of[0]},
        "intervals": {key: interval(each) for key, each in values.items()},
        "ensemble_gains": _gains(values, drawn["ensemble"]),
        "forward_passes": 1,
        "seconds": float(np.mean([row.seconds for row in members])),
        "used": [],
        "error": None,
    }


def _mean(values: list[Floats]) -> Floats:
    return np.asarray(np.mean(values, axis=0), dtype=np.float64)


def _document(
    row: _Row, drawn: dict[str, Floats] | None, ensemble: dict[str, Floats]
) -> dict[str, Any]:
    return {
        "name": row.name,
        "metrics": row.scores.metrics() if row.scores else {},
        "intervals": {key: interval(values) for key, values in (drawn or {}).items()},
        "ensemble_gains": _gains(drawn, ensemble) if drawn else None,
        "selection": row.selection.metrics() if row.selection else {},
        "forward_passes": row.forward_passes,
        "seconds": round(row.seconds, 4),
        "used": list(row.used),
        "error": row.error,
    }


def _gains(drawn: dict[str, Floats], ensemble: dict[str, Floats]) -> list[float]:
    """The 95 % interval of the ensemble's accuracy less this one's, on the same draws."""
    return list(interval(ensemble["accuracy"] - drawn["accuracy"]))
