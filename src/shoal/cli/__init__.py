"""The command line: one file a verb, which parses, calls, prints.

Importing this package imports no torch: `shoal --help` answers at once.
"""

from shoal.cli.app import main

__all__ = ["main"]
