"""`docs/coverage.md`: the table with marks, and below it the reasons why cells are refused.

page({("gpt", "dp2"): outcome, …})         # the text
"""

import datetime
import importlib.metadata
import platform
from collections.abc import Mapping

import shoal
from cells import Outcome
from plan import Cell
from zoo import SUBJECTS

MARKS = {"equal": "=", "wrong": "**✗**", "broken": "**✗**", "hung": "**✗**", "absent": "?"}

HEAD = """\
# Which model under which strategy

Written by `make coverage-table` on {date}: {versions}.

Each cell is a verification in float64 ([what is compared](verify.md)) over three steps, with
batches that do not divide evenly: **=** equal to one device (every output, loss, gradient, buffer,
weight and optimizer state within 1e-10), a number where it is refused, with the reason below.
{count}

Models that are listed for it run under every strategy; of the others, which have one thing each
that is special, an empty cell is one that is not in the table (`python tests/coverage --full`).

The models are tiny and their weights random. They are in `tests/zoo`, plain modules that know
nothing of Shoal.
"""


def page(outcomes: Mapping[Cell, Outcome]) -> str:
    """The whole page, from what became of each cell."""
    models = list(dict.fromkeys(model for model, _ in outcomes))
    strategies = list(dict.fromkeys(strategy for _, strategy in outcomes))
    numbers = _numbered(outcomes)
    parts = [HEAD.format(date=today(), versions=_versions(), count=_count(outcomes))]
    for family in dict.fromkeys(SUBJECTS[model].family for model in models):
        rows = [model for model in models if SUBJECTS[model].family == family]
        parts.append(f"## {family.capitalize()}\n")
        parts.append(_table(rows, strategies, outcomes, numbers))
    parts.append(_wrong(outcomes))
    parts.append(_reasons(outcomes, numbers))
    return "\n".join(part for part in parts if part)


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _versions() -> str:
    found = [f"Shoal {shoal.__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def _count(outcomes: Mapping[Cell, Outcome]) -> str:
    verdicts = [outcome.verdict for outcome in outcomes.values()]
    wrong = sum(verdict in ("wrong", "broken", "hung") for verdict in verdicts)
    return (
        f"Of {len(verdicts)} cells {verdicts.count('equal')} are equal, "
        f"{verdicts.count('refused')} refused, {wrong} wrong."
    )


def _numbered(outcomes: Mapping[Cell, Outcome]) -> dict[str, int]:
    """A number for each reason of a refusal, in the order of the table."""
    reasons = (
        _reason(strategy, outcome)
        for (_, strategy), outcome in outcomes.items()
        if outcome.verdict == "refused"
    )
    return {reason: number for number, reason in enumerate(dict.fromkeys(reasons), start=1)}


def _reason(strategy: str, outcome: Outcome) -> str:
    """A refusal without the strategy's name in front: many share the rest."""
    return outcome.reason.removeprefix(f"strategy {strategy}: ")


def _table(
    models: list[str],
    strategies: list[str],
    outcomes: Mapping[Cell, Outcome],
    numbers: Mapping[str, int],
) -> str:
    lines = [
        f"| model | what is special | {' | '.join(strategies)} | largest error |",
        f"|---|---|{'---|' * len(strategies)}---|",
    ]
    for model in models:
        row = [outcomes.get((model, strategy)) for strategy in strategies]
        marks = [_mark(*cell, numbers) for cell in zip(strategies, row, strict=True)]
        errors = [each.error for each in row if each is not None and each.verdict == "equal"]
        worst = max((error for error in errors if error is not None), default=None)
        shown = "" if worst is None else f"{worst:.0e}"
        lines.append(f"| {model} | {SUBJECTS[model].note} | {' | '.join(marks)} | {shown} |")
    return "\n".join(lines) + "\n"


def _mark(strategy: str, outcome: Outcome | None, numbers: Mapping[str, int]) -> str:
    if outcome is None:
        return ""
    return MARKS.get(outcome.verdict) or str(numbers[_reason(strategy, outcome)])


def _wrong(outcomes: Mapping[Cell, Outcome]) -> str:
    lines = [
        f"- {model} under {strategy}: {outcome.verdict}. {_one_line(outcome.reason)}"
        + (f" Waits for {waits}." if (waits := SUBJECTS[model].waits_for) else "")
        for (model, strategy), outcome in outcomes.items()
        if not outcome.good
    ]
    return "\n".join(["## Wrong\n", *lines, ""]) if lines else ""


def _reasons(outcomes: Mapping[Cell, Outcome], numbers: Mapping[str, int]) -> str:
    if not numbers:
        return ""
    lines = ["## Why refused\n"]
    for reason, number in numbers.items():
        where = [
            cell
            for cell, each in outcomes.items()
            if each.verdict == "refused" and _reason(cell[1], each) == reason
        ]
        lines.append(f"{number}. {_one_line(reason)} ({_where(where)})")
    return "\n".join([*lines, ""])


def _where(cells: list[Cell]) -> str:
    """The cells of a reason, as short as it goes."""
    models = list(dict.fromkeys(model for model, _ in cells))
    strategies = list(dict.fromkeys(strategy for _, strategy in cells))
    if len(models) > 4:
        return f"{', '.join(strategies)}: {len(models)} models"
    return f"{', '.join(models)}: {', '.join(strategies)}"


def _one_line(text: str) -> str:
    """Text that Markdown leaves as it is."""
    joined = ". ".join(line.strip().removesuffix(".") for line in text.splitlines() if line)
    for character in "\\`*_<>|":
        joined = joined.replace(character, "\\" + character)
    return joined
