"""The command line: thin commands that parse, call a pipeline, and show what it returns.

Results go to stdout, progress to stderr. torch is imported by the pipelines, inside the commands, so that
``saq --help`` and shell completion stay fast.
"""

from saqcli.cli.app import app, main

__all__ = ["app", "main"]
