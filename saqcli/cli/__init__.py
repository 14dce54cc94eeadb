"""The command line: thin commands that parse, call a workflow, and show what it returns.

stdout is the answer and stderr the progress. torch is imported by the workflows, inside the commands, so that
``saq --help`` and shell completion stay quick.
"""

from saqcli.cli.app import app, main

__all__ = ["app", "main"]
