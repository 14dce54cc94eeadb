"""Sensitivity as two heat maps: how loss and accuracy change when one layer alone is at other bits."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saqcli.algorithms.instruments.sensitivity import SensitivityReading
from saqcli.workflows.pictures.canvas import (
    FAINT,
    INK,
    new_figure,
    of_images,
    put_legend,
    put_title,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
MAP = "PuOr"  # diverging, colour-blind-safe; orange is worse
ROW = 0.235  # inches a layer
BAR = 0.11  # inches that a colour bar is thick
NOTHING = 1e-5  # changes below this share of the largest one are written as 0
ENOUGH = 3  # candidates that make a panel wide enough for five numbers at its colour bar
FAR = 100  # times below the largest change of the loss colours get linear


def paint_sensitivity(
    subjects: list[tuple[str, SensitivityReading]], images: str = ""
) -> "dict[str, Figure]":
    """``sensitivity``, and ``sensitivity_against`` for the second model, on the same scales."""
    tables = [_tables(reading) for _, reading in subjects]
    limits = [_limit(pair[k] for pair in tables) for k in range(2)]
    keys = ("sensitivity", "sensitivity_against")
    return {
        key: _figure(name, reading, pair, limits, images)
        for key, (name, reading), pair in zip(keys, subjects, tables, strict=False)
    }


def _tables(reading: SensitivityReading) -> tuple[Array, Array]:
    """Changes of loss and of top-1, (layers, candidates); NaN where the loss was NaN or infinite."""
    loss = [[c.loss_change for c in layer.candidates] for layer in reading.layers]
    top1 = [[c.top1_change for c in layer.candidates] for layer in reading.layers]
    return np.array(loss, dtype=np.float64), np.array(top1, dtype=np.float64)


def _limit(tables: Any) -> float:
    """The largest finite change in any of the tables; 1 where nothing changes."""
    return max((float(np.abs(t[np.isfinite(t)]).max(initial=0.0)) for t in tables), default=0.0) or 1.0


def _figure(
    name: str, reading: SensitivityReading, tables: tuple[Array, Array], limits: list[float], images: str
) -> "Figure":
    import matplotlib
    from matplotlib.colors import Normalize, SymLogNorm
    from matplotlib.patches import Patch, Rectangle

    bits = [candidate.bits for candidate in reading.layers[0].candidates]
    rows = len(reading.layers)
    figure = new_figure(3.4 + 2 * (0.62 * len(bits) + 0.9), 2.3 + ROW * rows)
    put_title(
        figure,
        name,
        "One layer at other bits, all others as they are",
        of_images(f"unchanged: loss {reading.loss:.4g}, top-1 {reading.top1:.2f} %", images),
    )
    figure.set_layout_engine("constrained", wspace=0.05)  # between the numbers of the two colour bars
    axes: Any = figure.subplots(2, 2, sharey="row", height_ratios=(ROW * rows, BAR))
    loss_scale = SymLogNorm(limits[0] / FAR, vmin=-limits[0], vmax=limits[0])
    panels = (
        (tables[0], f"{MAP}_r", loss_scale, 1 / 10, "change of the loss", "{:+.2g}"),
        (tables[1], MAP, Normalize(-limits[1], limits[1]), 1 / 2, "change of top-1, in points", "{:+.1f}"),
    )
    framed = unknown = False
    for k, (values, colours, norm, half, title, form) in enumerate(panels):
        ax, limit = axes[0][k], limits[k]
        image = ax.imshow(
            np.ma.masked_invalid(values),
            norm=norm,
            cmap=matplotlib.colormaps[colours].with_extremes(bad=FAINT),
            aspect="auto",
        )
        for (row, column), value in np.ndenumerate(values):
            known = bool(np.isfinite(value))
            dark = known and abs(float(norm(value)) - 0.5) > 0.32
            text = form.format(value) if abs(value) > NOTHING * limit else "0"
            text = text if known and float(text) != 0 else "0" if known else "NaN"
            colour = "white" if dark else INK
            ax.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
            unknown |= not known
        for row, layer in enumerate(reading.layers):
            if layer.weight_bits == layer.activation_bits and layer.weight_bits in bits:
                corner = (bits.index(layer.weight_bits) - 0.5, row - 0.5)
                ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=INK, linewidth=1.1))
                framed = True
        ax.set_xticks(range(len(bits)), [str(b) for b in bits])
        ax.set_xlabel("bits of weights and inputs")
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
        bar = figure.colorbar(image, cax=axes[1][k], orientation="horizontal")
        shares = (-1, -half, 0, half, 1) if len(bits) >= ENOUGH else (-1, 0, 1)
        bar.set_ticks([s * limit for s in shares], labels=[f"{s * limit:+.2g}" if s else "0" for s in shares])
        bar.minorticks_off()
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
        ax.set_title(title)
    axes[0][0].set_yticks(range(rows), [shortened(layer.name) for layer in reading.layers])
    handles = []
    if framed:
        text = "bits that the layer has, with newly fitted levels"
        handles.append(Patch(facecolor="none", edgecolor=INK, label=text))
    if unknown:
        handles.append(Patch(facecolor=FAINT, edgecolor="none", label="loss NaN or infinite"))
    put_legend(figure, handles)
    return figure
