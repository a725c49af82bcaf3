"""`shoal predict RUN…`: predict with the models of some runs, or compare the ways to."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli.train import AsJson, Debug


class Way(StrEnum):
    """The choices of --how."""

    BEST = "best"
    MEAN = "mean"
    GREEDY_SOUP = "greedy-soup"
    MATCHED_MEAN = "matched-mean"
    ENSEMBLE = "ensemble"


def command(
    runs: Annotated[list[Path], typer.Argument(help="Runs' folders, as in runs/digits-0001.")],
    how: Annotated[
        Way | None,
        typer.Option(help="Which model of several. Default: ensemble, or the one there is."),
    ] = None,
    strategy: Annotated[
        str, typer.Option("--strategy", "-s", help="Devices to predict on: single, dp2, pp2, tp2.")
    ] = "single",
    data: Annotated[
        str | None,
        typer.Option(help="A source: digits:test, a folder. Default: what is evaluated on."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write: .parquet, .csv or .jsonl (--compare: .html)."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Judge every way on held-out data; write a page.")
    ] = False,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Go on without members that are damaged.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Predict with one model, an ensemble, or merged weights; or compare them (--compare)."""
    from shoal.cli.shared import errors_shown, output_kept, print_document

    with errors_shown(debug, as_json=as_json), output_kept():
        from shoal.predict import Options, open_runs

        options = Options(how and how.value, strategy, data, out, skip_damaged)
        if compare:
            from shoal.predict.comparing import compare_with

            compared = compare_with(open_runs(runs), options)
            document, text = compared.document, compared.text()
        else:
            from shoal.predict import predict_with

            document = predict_with(open_runs(runs), options).to_json()
            text = _text(document)
    if as_json:
        print_document(document)
    sys.stderr.write(text + "\n")


def _text(document: dict[str, Any]) -> str:
    from shoal.report.text import metrics_text, printable

    said = metrics_text(document["metrics"]) or "no labels to compare with"
    models = f"{len(document['used'])} of {document['members']} models"
    lines = [f"{document['how']} ({models}), {document['examples']} examples: {said}"]
    lines += [f"note: {note}" for note in document["notes"]]
    lines += [f"out     {document['out']}"] if document["out"] else []
    return printable("\n".join(lines))
