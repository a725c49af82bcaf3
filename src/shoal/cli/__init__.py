"""The command line: one file a verb, which parses, calls, prints.

Importing this package imports no torch: `shoal --help` answers at once.
"""

import gc

__all__ = ["main"]


def main() -> None:
    """The entry point of the `shoal` command."""
    # Imports make no garbage to speak of, and looking for it takes a twentieth of `shoal --help`.
    wanted = gc.isenabled()
    gc.disable()
    from shoal.cli.app import main as run

    if wanted:
        gc.enable()
    run()
