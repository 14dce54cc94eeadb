"""Readings as pictures: every instrument that has one, PNG and SVG, ready for a report.

A painter takes the readings of one model, or of two to be compared, each with the model's name, and which images
they are of ("500 training images", or "" for unknown); it returns figures by name. To add one: write it beside
the others and add its line to the table.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saqcli.workflows.pictures.bars import paint_eigenvalue, paint_flips, paint_trace
from saqcli.workflows.pictures.canvas import save, style
from saqcli.workflows.pictures.heatmap import paint_sensitivity
from saqcli.workflows.pictures.histograms import paint_distributions
from saqcli.workflows.pictures.surfaces import paint_landscape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saqcli.algorithms.instruments import Reading

Painter = Callable[[list[tuple[str, Any]], str], "dict[str, Figure]"]

PAINTERS: dict[str, Painter] = {
    "eigenvalue": paint_eigenvalue,
    "trace": paint_trace,
    "flips": paint_flips,
    "distributions": paint_distributions,
    "sensitivity": paint_sensitivity,
    "landscape": paint_landscape,
}


def draw(
    instrument: str, subjects: "list[tuple[str, Reading]]", folder: Path, images: str = ""
) -> list[Path]:
    """Draw the readings of an instrument.

    Args:
        instrument: name in ``INSTRUMENTS``.
        subjects: one or two models: what they are called, and their readings.
        folder: where the pictures go.
        images: that the readings are of, such as "500 training images".

    Returns:
        Paths of the files written; none for an instrument without a picture.
    """
    if instrument not in PAINTERS:
        return []
    with style():
        figures = PAINTERS[instrument](subjects, images)
        return [path for name, figure in figures.items() for path in save(figure, folder / name)]
