"""``saq models``: a table on a terminal, bare names for a pipe, everything as JSON.

The networks that a pattern matches, as a table that fits the terminal.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from saqcli.cli import options as o
from saqcli.cli.console import print_json, reporting
from saqcli.cli.tables import print_table, say
from saqcli.units import counted, format_quantity

if TYPE_CHECKING:
    from saqcli.models.catalogue import Entry

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


@reporting
def models_command(
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="PATTERN",
            help="Shell pattern: `'resnet*'`, or `'resnet50.*'` for the published weights of one network; all where "
            "none is given.",
        ),
    ] = None,
    json_output: o.Json = False,
    verbose: o.Verbose = False,
) -> None:
    """Networks that can be quantized; on a terminal with parameters, input size and published weights.

    Covered are those whose family's smallest network passed wrapping, calibration, a SAQ step and verified export.

    Example: `saq models 'timm/mobilenetv3*'`
    """
    from saqcli.errors import UnknownModel
    from saqcli.models.catalogue import find

    entries = find(pattern)
    if not entries:
        raise UnknownModel(
            f"no network matches {pattern!r}: try a wider pattern such as '*{(pattern or '').strip('*')}*'"
        )
    if json_output:
        print_json(
            {
                "models": [
                    {
                        "name": entry.name,
                        "parameters": entry.parameters,
                        "input_size": entry.input_size,
                        "tags": entry.tags,
                        "covered": entry.covered,
                    }
                    for entry in entries
                ]
            }
        )
    elif sys.stdout.isatty():
        show_models(entries)
    else:
        for entry in entries:
            typer.echo(entry.name)
