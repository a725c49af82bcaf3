"""`shoal export RUN --out FILE`: the weights of a run as one plain file."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.train import AsJson, Debug


def command(
    run: Annotated[Path, typer.Argument(help="A run's folder, as in runs/digits-0001.")],
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    how: Annotated[
        str | None,
        typer.Option(
            help="Of models trained apart (solo): best, mean, greedy-soup or matched-mean."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a run's weights, whole and by name, for any program that reads safetensors."""
    from shoal.cli.shared import errors_shown, output_kept, print_document

    with errors_shown(debug, as_json=as_json), output_kept():
        from shoal.predict import export

        exported = export(run, out, how)
    document = {
        "out": str(exported.path),
        "tensors": exported.tensors,
        "bytes": exported.bytes,
    }
    if as_json:
        print_document(document)
    sys.stderr.write("{tensors} tensors, {bytes} bytes in {out}\n".format(**document))
