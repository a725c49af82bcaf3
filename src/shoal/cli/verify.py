"""`shoal verify RECIPE --strategy S`: compare a strategy with one device."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.train import AsJson, Changes, Debug


class Dtype(StrEnum):
    """The choices of --dtype."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BF16 = "bf16"


def command(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe, as in recipes/digits.yaml, or the folder of a run.")
    ],
    strategy: Annotated[
        str | None,
        typer.Option("--strategy", "-s", help="The split to check: dp2, … Default: the run's."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps to compare.")] = 3,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="What the ranks compute in. Default: float64; bf16 with +bf16."),
    ] = None,
    changes: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder to write certificate.json into. Default: the run's."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prove that a strategy computes what one device would: outputs, loss, gradients, weights."""
    from shoal.cli.shared import errors_shown, output_kept, print_document

    with errors_shown(debug, as_json=as_json), output_kept():
        from shoal.errors import UsageError
        from shoal.recipe import load_recipe
        from shoal.run import Run
        from shoal.verify import verify

        if recipe.is_dir():
            run = Run.open(recipe)
            strategy, out = strategy or str(run.strategy), out or run.path
            recipe = run.path / "recipe.yaml"
        if strategy is None:
            raise UsageError(
                "verify needs a strategy to compare with one device",
                hint="Give one, as in --strategy dp2, or the folder of a run.",
            )
        loaded = load_recipe(recipe, tuple(changes or ()))
        certificate = verify(loaded.recipe, strategy, steps=steps, dtype=dtype and dtype.value)
        if out is not None:
            certificate.write(out)
    if as_json:
        print_document(certificate.to_json())
    sys.stderr.write(certificate.text() + "\n")
    if certificate.refused is not None:
        raise typer.Exit(2)
    if not certificate.ok:
        raise typer.Exit(1)
