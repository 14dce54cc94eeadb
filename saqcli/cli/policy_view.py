"""Which layer got how many bits, as bars in a terminal: a row a layer, in execution order."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from saqcli.cli.tables import print_table, say
from saqcli.quant.bits import LayerBits, mean_bits
from saqcli.units import format_quantity

BLOCK = "■"
# Little to much, in quarters of the largest share: of middling brightness, so that they can be read on dark and on
# light, and told apart by colour-blind readers from their brightness and the number beside them.
COLOURS = ("#3B86D1", "#8A83C6", "#D18A2C", "#DC4A3D")
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
    rows = []
    for layer in layers:
        bits = policy[layer["name"]]
        colour = COLOURS[min(int(len(COLOURS) * layer["bops"] / most), len(COLOURS) - 1)]
        style = "dim" if layer["pinned"] else ""
        rows.append(
            [
                Text(str(layer["name"]) + (PINNED if layer["pinned"] else ""), style=style),
                _bar(bits["weight"], colour, style),
                _bar(bits["activation"], colour, style),
                Text(format_quantity(layer["bops"]), style=style),
                Text(f"{100 * layer['bops'] / total:.1f} %", style=style),
            ]
        )
    print_table(console, ("layer", "weights", "inputs", "BOPs", "share"), rows, left=(0, 1, 2))
    colours = "; colours by share of BOPs" if console.color_system else ""
    say(console, _summary(policy, layers) + colours)


def _bar(bits: int | None, colour: str, style: str) -> Text:
    """A block a bit, and the number."""
    text = Text(style=style)
    if bits is None:
        return text.append("float", style=colour)
    return text.append(BLOCK * bits, style=colour).append(f" {bits}", style="default")


def _summary(policy: Mapping[str, Mapping[str, int | None]], layers: Sequence[Mapping[str, Any]]) -> str:
    """Mean bits, as the pictures have them."""
    bits = {
        name: LayerBits(weight=one["weight"], activation=one["activation"]) for name, one in policy.items()
    }
    macs = {str(layer["name"]): int(layer["macs"]) for layer in layers}
    weights, inputs = mean_bits({name: bits[name] for name in macs}, macs)
    return f"\nmean bits, weighted by MACs: weights {weights:.2f}, inputs {inputs:.2f}"
