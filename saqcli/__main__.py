"""Makes ``python -m saqcli`` do what ``saq`` does."""

from saqcli.cli import main

main()
