"""Sensitivity as two heat maps: how loss and accuracy change when one layer alone is at other bits."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saqcli.algorithms.instruments.sensitivity import SensitivityReading
from saqcli.workflows.pictures.canvas import INK, new_figure, shortened, titles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
MAP = "PuOr_r"  # diverging, colour-blind-safe; orange is worse
ROW = 0.235  # inches a layer
NOTHING = 5e-5  # smaller changes are written as 0


def paint_sensitivity(subjects: list[tuple[str, SensitivityReading]]) -> "dict[str, Figure]":
    """``sensitivity``, and ``sensitivity_against`` for the second model, on the same scales."""
    names = titles([target for target, _ in subjects])
    tables = [_tables(reading) for _, reading in subjects]
    limits = [max(float(np.abs(pair[k]).max()) for pair in tables) or 1.0 for k in range(2)]
    keys = ("sensitivity", "sensitivity_against")
    return {
        key: _figure(name, reading, pair, limits)
        for key, name, (_, reading), pair in zip(keys, names, subjects, tables, strict=False)
    }


def _tables(reading: SensitivityReading) -> tuple[Array, Array]:
    """Changes of loss and of top-1, (layers, candidates)."""
    loss = [[c.loss_change for c in layer.candidates] for layer in reading.layers]
    top1 = [[c.top1_change for c in layer.candidates] for layer in reading.layers]
    return np.array(loss, dtype=np.float64), np.array(top1, dtype=np.float64)


def _figure(
    name: str, reading: SensitivityReading, tables: tuple[Array, Array], limits: list[float]
) -> "Figure":
    from matplotlib.colors import Normalize, SymLogNorm
    from matplotlib.patches import Rectangle

    bits = [candidate.bits for candidate in reading.layers[0].candidates]
    rows = len(reading.layers)
    figure = new_figure(3.4 + 2 * (0.62 * len(bits) + 0.9), 1.5 + ROW * rows)
    figure.suptitle(
        f"{name}: one layer at other bits\nas it is: loss {reading.loss:.4g}, top-1 {reading.top1:.2f} %",
        fontsize=10,
    )
    axes: Any = figure.subplots(1, 2, sharey=True)
    loss_scale = SymLogNorm(max(limits[0] / 100, 1e-6), vmin=-limits[0], vmax=limits[0])
    panels = (
        (axes[0], tables[0], 1, loss_scale, "change of the loss", "{:+.2g}"),
        (axes[1], tables[1], -1, Normalize(-limits[1], limits[1]), "change of top-1 (points)", "{:+.1f}"),
    )
    for ax, values, worse, norm, title, form in panels:
        ax.imshow(worse * values, norm=norm, cmap=MAP, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            dark = abs(float(norm(worse * value)) - 0.5) > 0.32
            text = form.format(value) if abs(value) > NOTHING else "0"
            colour = "white" if dark else INK
            ax.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
        for row, layer in enumerate(reading.layers):
            if layer.weight_bits == layer.activation_bits and layer.weight_bits in bits:
                corner = (bits.index(layer.weight_bits) - 0.5, row - 0.5)
                ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=1.1))
        ax.set_title(title)
        ax.set_xticks(range(len(bits)), [str(b) for b in bits])
        ax.set_xlabel("bits of weights and inputs")
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
    axes[0].set_yticks(range(rows), [shortened(layer.name) for layer in reading.layers])
    figure.supxlabel("framed: the bits that the layer has, with freshly fitted levels", fontsize=7.5)
    return figure
