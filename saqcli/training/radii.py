"""Published radii of perturbations, by network and bit-width: ``radii.csv``, with the source of every row.

The mean bit-width of the free layers' weights decides, as a whole number from 2 to 4. A network without a row at that
width takes the row for images of its size.
"""

import csv
import io
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from torch import nn

from saqcli.models.preprocessing import SMALL_IMAGES
from saqcli.quant.layer import quantized_layers

_WIDTHS = (2, 4)  # the least and the most of the table


class Radius(NamedTuple):
    """A radius and where it is from.

    Attributes:
        rho: in deviations of each layer's weights, unless another unit was given with it.
        source: of the row, or the setting that gave it.
    """

    rho: float
    source: str


@cache
def _table() -> dict[tuple[str, int], Radius]:
    text = (files("saqcli") / "training" / "radii.csv").read_text(encoding="utf-8")
    found: dict[tuple[str, int], Radius] = {}
    for row in csv.DictReader(io.StringIO(text)):
        names = [row["network"]] if "/" not in row["network"] else row["network"].split()
        source = f"{row['source']}, at {row['bits']} bits"
        found |= {(name, int(row["bits"])): Radius(float(row["rho"]), source) for name in names}
    return found


def published_radius(model: nn.Module, side: int, network: str = "") -> Radius:
    """The published radius for a network at its bits.

    Args:
        model: wrapped, quantizers installed.
        side: larger side of its images, in pixels.
        network: canonical name; a tag of weights does not matter (``timm/resnet18.a1_in1k``).
    """
    widths = [layer.bits.weight or 8 for layer in quantized_layers(model).values()]
    free = [bits for bits in widths if bits < 8] or [8]
    least, most = _WIDTHS
    nearest = min(most, max(least, round(sum(free) / len(free))))
    size = "small images" if side <= SMALL_IMAGES else "large images"
    table = _table()
    return table.get((network.partition(".")[0], nearest), table[size, nearest])
