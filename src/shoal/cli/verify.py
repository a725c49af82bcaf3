"""`shoal verify RECIPE --strategy S`: compare a strategy with one device, in float64."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.train import AsJson, Changes, Debug, RecipePath


def command(
    recipe: RecipePath,
    strategy: Annotated[str, typer.Option("--strategy", "-s", help="The split to check: dp2, …")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps to compare.")] = 3,
    changes: Changes = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder to write certificate.json into.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prove that a strategy computes what one device would: outputs, loss, gradients, weights."""
    from shoal.cli.shared import errors_shown, output_kept, print_document

    with errors_shown(debug, as_json=as_json), output_kept():
        from shoal.recipe import load_recipe
        from shoal.verify import verify

        loaded = load_recipe(recipe, tuple(changes or ()))
        certificate = verify(loaded.recipe, strategy, steps=steps)
        if out is not None:
            certificate.write(out)
    if as_json:
        print_document(certificate.to_json())
    sys.stderr.write(certificate.text() + "\n")
    if certificate.refused is not None:
        raise typer.Exit(2)
    if not certificate.ok:
        raise typer.Exit(1)
