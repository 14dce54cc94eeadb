"""The command line: one file per command.

Results go to stdout, progress to stderr. A command is imported when it is used, and imports pipelines, and with them
torch, inside its function, so that help and shell completion stay fast.
"""

from saqcli.cli.app import app, main

__all__ = ["app", "main"]
