"""Makes ``python -m saqcli`` and ``torchrun -m saqcli`` do what ``saq`` does."""

from saqcli.cli import main

main()
