"""The networks that a pattern matches, as a table that fits the terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from saqcli.cli.tables import print_table, say
from saqcli.units import counted, format_quantity

if TYPE_CHECKING:
    from saqcli.io.catalogue import Entry

COVERED = {True: Text("yes"), False: Text("no", style="red"), None: Text("-")}


def show_models(entries: "Sequence[Entry]") -> None:
    """A line a network. Of published weights the default, and how many others there are, where names carry none."""
    console = Console()
    tagged = all("." in entry.name for entry in entries)
    rows: list[list[str | Text]] = [
        [
            entry.name,
            "-" if entry.parameters is None else format_quantity(entry.parameters),
            _pixels(entry.input_size),
            *([] if tagged else [_weights(entry.tags)]),
            COVERED[entry.covered],
        ]
        for entry in entries
    ]
    columns = ["network", "parameters", "input", *([] if tagged else ["weights"]), "covered"]
    print_table(console, columns, rows, left=(0, *(() if tagged else (3,)), len(columns) - 1))
    say(console, f"[dim]{_notes(entries, tagged)}[/dim]", markup=True)


def _pixels(size: tuple[int, int, int]) -> str:
    """One side where both are equal; the number of channels where it is not 3."""
    channels, height, width = size
    sides = str(height) if height == width else f"{height}x{width}"
    return sides if channels == 3 else f"{channels}x{sides}"


def _weights(tags: tuple[str, ...]) -> Text:
    default, *others = tags or ("-",)
    return Text(default).append(f" +{len(others)}", style="dim") if others else Text(default)


def _notes(entries: "Sequence[Entry]", tagged: bool) -> str:
    """How many there are, and where the other weights are to be seen."""
    notes = [counted(len(entries), "network")]
    most = max(entries, key=lambda entry: len(entry.tags))
    if not tagged and len(most.tags) > 1:
        notes.append(f"all weights of one: saq models '{most.name}.*'")
    return "; ".join(notes)
