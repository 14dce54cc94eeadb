"""Which layer got how many bits, as bars in a terminal: a row a layer, in execution order."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saqcli.cli.tables import plain_table, say
from saqcli.quant.bits import LayerBits, mean_bits
from saqcli.units import format_quantity
from saqcli.workflows.pictures.canvas import shortened

BLOCK = "■"
# Little to much, in quarters of the largest share: of middling brightness, so that they can be read on dark and on
# light, and told apart by colour-blind readers from their brightness and the number beside them.
COLOURS = ("#3B86D1", "#8A83C6", "#D18A2C", "#DC4A3D")
OTHERS = 46  # characters of a line that are not the name
SHORTEST_NAME = 12
WIDEST = 1000  # characters of a line that no terminal cuts
PINNED = " (pinned)"


def show_policy(
    policy: Mapping[str, Mapping[str, int | None]],
    layers: Sequence[Mapping[str, Any]],
    *,
    bops: int | None = None,
) -> None:
    """Print the bits of every layer.

    Args:
        policy: ``weight`` and ``activation`` by the name of the layer; None is floating point.
        layers: in execution order, as ``saq profile --json`` has them, measured at the bits of ``policy``.
        bops: of the whole network; the sum over the layers where it is not given.
    """
    console = Console()
    total = (sum(layer["bops"] for layer in layers) if bops is None else bops) or 1
    most = max((layer["bops"] for layer in layers), default=0) or 1
    table = _table()
    room = console.width - OTHERS if console.is_terminal else None
    for layer in layers:
        bits = policy[layer["name"]]
        colour = COLOURS[min(int(len(COLOURS) * layer["bops"] / most), len(COLOURS) - 1)]
        table.add_row(
            _name(layer, room),
            _bar(bits["weight"], colour),
            _bar(bits["activation"], colour),
            format_quantity(layer["bops"]),
            f"{100 * layer['bops'] / total:.1f} %",
            style="dim" if layer["pinned"] else None,
        )
    if not console.is_terminal:  # nobody reads it in a window: every name in full
        wide = console.options.update(width=WIDEST)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
    colours = "; colours by share of BOPs" if console.color_system else ""
    say(console, _summary(policy, layers) + colours)


def _table() -> Table:
    table = plain_table("")
    table.title = None
    for column in ("layer", "weights", "inputs", "BOPs", "share"):
        table.add_column(column, justify="right" if column in ("BOPs", "share") else "left", no_wrap=True)
    return table


def _name(layer: Mapping[str, Any], room: int | None) -> Text:
    """The name of a layer, with its middle left out where it is longer than ``room`` characters."""
    mark = PINNED if layer["pinned"] else ""
    name = str(layer["name"])
    return Text((name if room is None else shortened(name, max(room - len(mark), SHORTEST_NAME))) + mark)


def _bar(bits: int | None, colour: str) -> Text:
    """A block a bit, and the number."""
    if bits is None:
        return Text("float", style=colour)
    return Text(BLOCK * bits, style=colour).append(f" {bits}", style="default")


def _summary(policy: Mapping[str, Mapping[str, int | None]], layers: Sequence[Mapping[str, Any]]) -> str:
    """Mean bits, as the pictures have them."""
    bits = {
        name: LayerBits(weight=one["weight"], activation=one["activation"]) for name, one in policy.items()
    }
    macs = {str(layer["name"]): int(layer["macs"]) for layer in layers}
    weights, inputs = mean_bits({name: bits[name] for name in macs}, macs)
    return f"\nmean bits, weighted by MACs: weights {weights:.2f}, inputs {inputs:.2f}"
