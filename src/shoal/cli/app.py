"""`shoal`: the verbs together, and what happens to an error."""

import signal
import sys
from typing import Any

import typer

from shoal.cli import export, predict, train, verify
from shoal.version import __version__

# typer exports only the child of what its parser raises, whose home differs between its versions.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="shoal",
    help="Train one PyTorch model on many devices, and prove that the split computes what one "
    "device would.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: importing rich would take longer than all the rest
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
app.command("predict")(predict.command)
app.command("export")(export.command)


def main() -> None:
    """Run the verb that the command line names, and leave with its exit status."""
    # A recipe's own components are found as they are by `python script.py` in this folder.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        status = app(standalone_mode=False)
    except USAGE_ERROR as error:
        error.show()
        if "--json" in sys.argv:
            from shoal.cli.shared import print_document

            print_document({"error": {"kind": "UsageError", "message": error.format_message()}})
        status = 2
    except (typer.Abort, KeyboardInterrupt):  # before there was anything to stop
        status = 128 + signal.SIGINT
    sys.exit(status)
