"""The loss landscape as contours and as a surface; two models side by side on one colour scale.

Colours and heights are logarithmic: from the minimum to the rim of the landscape the loss often grows by
orders of magnitude, and the shape around the minimum is what is looked for.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saqcli.algorithms.instruments.landscape import LandscapeReading
from saqcli.workflows.pictures.canvas import new_figure, titles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Part = tuple[str, LandscapeReading, Array]  # title, reading, logarithms of its losses
LEVELS = 48  # of colour
FEWEST_TICKS, MOST_TICKS = 4, 10
FINE = 80  # steps along each side of a drawn surface, at least
LEAST = 1e-6  # losses below are drawn as this: a logarithm has no zero
MAP = "viridis"


def paint_landscape(subjects: list[tuple[str, LandscapeReading]]) -> "dict[str, Figure]":
    """``landscape_contour`` and ``landscape_surface``."""
    names = titles([target for target, _ in subjects])
    readings = [reading for _, reading in subjects]
    heights = [_heights(reading) for reading in readings]
    low = min(float(z.min()) for z in heights)
    high = max(float(z.max()) for z in heights)
    high = max(high, low + 0.01)  # a flat landscape has a colour too
    parts = list(zip(names, readings, heights, strict=True))
    return {
        "landscape_contour": _contour(parts, low, high),
        "landscape_surface": _surface(parts, low, high),
    }


def _heights(reading: LandscapeReading) -> Array:
    """Decimal logarithms of the losses, (grid, grid); those that are no number stand as high as the highest."""
    loss = np.array([[np.nan if v is None else v for v in row] for row in reading.loss], dtype=np.float64)
    top = np.nanmax(loss) if np.isfinite(loss).any() else 1.0
    heights: Array = np.log10(np.maximum(np.where(np.isfinite(loss), loss, top), LEAST))
    return heights


def _contour(parts: list[Part], low: float, high: float) -> "Figure":
    from matplotlib.ticker import FuncFormatter

    figure = new_figure(4.3 * len(parts) + 1.1, 4.9)
    axes: Any = figure.subplots(1, len(parts), squeeze=False, sharex=True, sharey=True)[0]
    levels = np.linspace(low, high, LEVELS)
    for index, (ax, (name, reading, z)) in enumerate(zip(axes, parts, strict=True)):
        axis = np.array(reading.axis)
        image = ax.contourf(axis, axis, z, levels=levels, cmap=MAP, extend="both")
        lines = ax.contour(
            axis, axis, z, levels=_ticks(low, high), colors="white", linewidths=0.7, linestyles="solid"
        )
        ax.clabel(lines, fmt=FuncFormatter(lambda v, _: _number(10**v)), fontsize=7)
        ax.plot(0, 0, marker="+", markersize=9, markeredgewidth=1.6, color="white")
        centre = reading.loss[reading.grid // 2][reading.grid // 2]
        at_centre = "no number" if centre is None else _number(centre)
        ax.set_title(f"{name}\nloss {at_centre} at the centre")
        ax.set_xlabel("along direction 1 (filter norms)")
        if index == 0:
            ax.set_ylabel("along direction 2 (filter norms)")
        ax.set_xticks(np.linspace(-reading.span, reading.span, 5))
        ax.set_yticks(np.linspace(-reading.span, reading.span, 5))
        ax.set_aspect("equal")
    _colour_bar(figure, image, axes, low, high, shrink=0.82)
    return figure


def _surface(parts: list[Part], low: float, high: float) -> "Figure":
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from mpl_toolkits import mplot3d  # noqa: F401  (makes the 3d projection known)

    figure = new_figure(4.7 * len(parts) + 0.9, 4.5)
    axes: Any = figure.subplots(1, len(parts), squeeze=False, subplot_kw={"projection": "3d"})[0]
    colours = ScalarMappable(Normalize(low, high), MAP)
    at = _ticks(low, high)
    for ax, (name, reading, z) in zip(axes, parts, strict=True):
        axis, fine = _finer(np.array(reading.axis), z)
        x, y = np.meshgrid(axis, axis)
        ax.plot_surface(
            x,
            y,
            fine,
            cmap=MAP,
            norm=colours.norm,
            rcount=len(axis),
            ccount=len(axis),
            linewidth=0,
            rasterized=True,  # thousands of faces make no good SVG
        )
        ax.set_zlim(low, high)
        ax.set_zticks(at, [_number(10**tick) for tick in at])
        ax.set_title(name, y=0.98)
        ax.set_xlabel("direction 1", labelpad=-4)
        ax.set_ylabel("direction 2", labelpad=-4)
        for set_ticks in (ax.set_xticks, ax.set_yticks):
            set_ticks(np.linspace(-reading.span, reading.span, 5))
        ax.tick_params(pad=-2, labelsize=7)
        ax.view_init(elev=34, azim=-56)
        for side in (ax.xaxis, ax.yaxis, ax.zaxis):
            side.set_pane_color((0.97, 0.97, 0.97, 1.0))
            side._axinfo["grid"].update(color=(0.85, 0.85, 0.85, 1.0), linewidth=0.5)
        ax.set_box_aspect((1, 1, 0.72), zoom=0.96)
    _colour_bar(figure, colours, axes, low, high, shrink=0.7)
    return figure


def _finer(axis: Array, z: Array) -> tuple[Array, Array]:
    """``z`` and its axis with straight lines between the points, so that colours run smoothly."""
    factor = max(1, FINE // (len(axis) - 1))
    fine = np.linspace(axis[0], axis[-1], factor * (len(axis) - 1) + 1)
    rows = np.array([np.interp(fine, axis, row) for row in z])
    return fine, np.array([np.interp(fine, axis, column) for column in rows.T]).T


def _colour_bar(figure: "Figure", image: Any, axes: Any, low: float, high: float, *, shrink: float) -> None:
    at = _ticks(low, high)
    bar = figure.colorbar(image, ax=list(axes), shrink=shrink, pad=0.03, ticks=at)
    bar.ax.set_yticklabels([_number(10**tick) for tick in at])
    bar.ax.minorticks_off()
    bar.set_label("cross-entropy loss")


def _ticks(low: float, high: float) -> list[float]:
    """Logarithms of round losses between two logarithms."""
    from matplotlib.ticker import MaxNLocator

    decades = high - low
    steps = (1,) if decades > 5 else (1, 3) if decades > 2 else (1, 2, 5) if decades > 0.8 else range(1, 10)
    first, last = math.floor(low), math.ceil(high)
    found = [k + math.log10(step) for k in range(first, last + 1) for step in steps]
    ticks = [tick for tick in found if low < tick < high]
    if len(ticks) < FEWEST_TICKS:  # a landscape of less than a decade
        even = [math.log10(loss) for loss in MaxNLocator(6).tick_values(10**low, 10**high) if loss > 0]
        ticks = [tick for tick in even if low < tick < high]
    return ticks[:: -(-len(ticks) // MOST_TICKS) or 1]


def _number(value: float) -> str:
    """Four significant digits, without an exponent where there is room."""
    return f"{value:.4g}" if value >= 0.001 or value == 0 else f"{value:.1e}"
