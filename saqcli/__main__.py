"""Runs ``saq`` as ``python -m saqcli``."""

from saqcli.cli import main

main()
