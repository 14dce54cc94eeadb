"""The command line: one file per command.

Results go to stdout, progress to stderr. Commands import pipelines, and with them torch, inside their functions, so
that ``saq --help`` and shell completion stay fast.
"""

from saqcli.cli.app import app, main

__all__ = ["app", "main"]
