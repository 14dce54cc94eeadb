"""The networks that a pattern matches, as a table that fits the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from saqcli.cli.tables import plain_table, say
from saqcli.units import format_quantity

if TYPE_CHECKING:
    from saqcli.io.catalogue import Entry

COVERED = {True: "yes", False: "[red]no[/red]", None: "-"}
NUMBERS = 32  # characters for parameters, input and coverage, the gaps before them included
TAG = 12  # characters for weights at least, likewise


def show_models(entries: "Sequence[Entry]") -> None:
    """A line a network. Of published weights the default, and how many others there are, where names carry none."""
    console = Console()
    tagged = all("." in entry.name for entry in entries)
    room = console.width - NUMBERS - (0 if tagged else TAG)
    longest = max(min(max(len(entry.name) for entry in entries), room), TAG)
    table = plain_table()
    table.add_column("network", min_width=longest, overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("input", justify="right", no_wrap=True)
    if not tagged:
        width = max(room + TAG - longest, TAG) - 2
        table.add_column("weights", no_wrap=True, overflow="ellipsis", max_width=width)
    table.add_column("covered", no_wrap=True)
    for entry in entries:
        parameters = "-" if entry.parameters is None else format_quantity(entry.parameters)
        weights = [] if tagged else [_weights(entry.tags)]
        table.add_row(entry.name, parameters, _pixels(entry.input_size), *weights, COVERED[entry.covered])
    console.print(table)
    say(console, f"[dim]{_notes(entries, tagged)}[/dim]", markup=True)


def _pixels(size: tuple[int, int, int]) -> str:
    """One side where both are equal; the number of channels where it is not 3."""
    channels, height, width = size
    sides = str(height) if height == width else f"{height}x{width}"
    return sides if channels == 3 else f"{channels}x{sides}"


def _weights(tags: tuple[str, ...]) -> str:
    default, *others = tags or ("-",)
    return f"{default} [dim]+{len(others)}[/dim]" if others else default


def _notes(entries: "Sequence[Entry]", tagged: bool) -> str:
    """How many there are, and where the other weights are to be seen."""
    notes = [f"{len(entries):,} networks" if len(entries) > 1 else "1 network"]
    most = max(entries, key=lambda entry: len(entry.tags))
    if not tagged and len(most.tags) > 1:
        notes.append(f"all weights of one: saq models '{most.name}.*'")
    return "; ".join(notes)
