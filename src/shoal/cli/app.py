"""`shoal`: the verbs together, and what happens to an error."""

import sys

import typer

from shoal.cli import train, verify
from shoal.version import __version__

app = typer.Typer(
    name="shoal",
    help="Train one PyTorch model on many devices, and prove that the split computes what one "
    "device would.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and leave."
    ),
) -> None:
    """Train one PyTorch model on many devices, and prove that the split is right."""


app.command("train")(train.command)
app.command("verify")(verify.command)


def main() -> None:
    """The entry point of the `shoal` command."""
    # A recipe's own components are found as they are by `python script.py` in this folder.
    if "" not in sys.path:
        sys.path.insert(0, "")
    app()
