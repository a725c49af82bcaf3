"""`shoal train RECIPE`: train, show progress, write the run folder."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Carrier(StrEnum):
    """The choices of --comm."""

    AUTO = "auto"
    SHM = "shm"
    GLOO = "gloo"


RecipePath = Annotated[Path, typer.Argument(help="A recipe, as in recipes/digits.yaml.")]
StrategyText = Annotated[
    str | None,
    typer.Option(
        "--strategy", "-s", help="How to split: single, dp2, dp4+bf16, auto. Default: the recipe's."
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; may be repeated."),
]
Out = Annotated[Path | None, typer.Option(help="The run's folder. Default: runs/NAME-0001, …")]
Comm = Annotated[
    Carrier,
    typer.Option(
        help="What carries data between ranks: shm is memory that one host's ranks share."
    ),
]
Replay = Annotated[
    Path | None,
    typer.Option(
        metavar="LEDGER",
        help="Apply contributions in the order of an asynchronous run: its staleness.jsonl.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Debug = Annotated[bool, typer.Option("--debug", help="Add tracebacks to errors.")]


def command(
    recipe: RecipePath,
    strategy: StrategyText = None,
    out: Out = None,
    changes: Changes = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with --out's run, or the newest unfinished one.")
    ] = False,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often to start again when a rank dies.")
    ] = 0,
    replay: Replay = None,
    comm: Comm = Carrier.AUTO,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show more.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a recipe on the devices of this machine (or as a rank of torchrun or Slurm)."""
    from shoal.cli.shared import errors_shown, leave, output_kept, print_document
    from shoal.train.ahead import begun

    with errors_shown(debug, as_json=as_json), output_kept(), begun(strategy) as begin:
        from shoal import report
        from shoal.recipe import load_recipe
        from shoal.train import Options, train_with

        loaded = load_recipe(recipe, tuple(changes or ()))
        transport = "shared_memory" if comm is Carrier.SHM else comm.value
        options = Options(out, resume, max_restarts, verbose, replay=replay, transport=transport)
        chosen = loaded.strategy_default if strategy is None else strategy
        ended = train_with(loaded.recipe, chosen, None, options, begin)
    if ended.error is not None:
        leave(ended.error, ended.exit_status, debug, ended.document, as_json=as_json)
    if ended.tells:
        sys.stderr.write(report.summary_lines(ended.document) + "\n")
        if as_json:
            print_document(ended.document)
    raise typer.Exit(ended.exit_status)
