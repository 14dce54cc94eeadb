"""Plots of the loss landscape as contours and as a surface.

Two models are drawn side by side on one color scale. Colors and heights are logarithmic: from the minimum to the rim
of the landscape the loss often grows by orders of magnitude, and the shape around the minimum is of interest.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from saqcli.analysis.landscape import LandscapeReading
from saqcli.report.canvas import FAINT, INK, new_figure, put_legend, put_title, shortened_to_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]
Part = tuple[str, LandscapeReading, Array]  # title, reading, logarithms of its losses
PANEL = 4.3  # inches per model
NAME = 3.2  # maximum inches of a model's name
LEVELS = 48  # number of colors
FEWEST_TICKS, MOST_TICKS = 4, 10
FINE = 80  # minimum steps along each side of a drawn surface
LEAST = 1e-6  # drawn in place of a loss of zero if no loss is positive
LEAST_RANGE = 0.02  # decades of a flat landscape
MARGIN = 0.07  # minimum distance of a contour label from the edge, as a share of the axis
APART = 0.11  # minimum distance of two contour labels, as a share of the axis
MAP = "viridis"
AXIS = "cross-entropy loss (log scale)"
TITLE = "Loss landscape over a plane through the quantized weights"


class Scale(NamedTuple):
    """Logarithms of the least and the greatest loss, and of the ticks."""

    low: float
    high: float
    ticks: list[float]

    @property
    def numbers(self) -> list[str]:
        """Labels of the ticks."""
        return [_number(10**tick) for tick in self.ticks]


def paint_landscape(models: list[tuple[str, LandscapeReading]], images: str = "") -> "dict[str, Figure]":
    """Figures ``landscape_contour`` and ``landscape_surface``."""
    heights = _heights([reading for _, reading in models])
    found = np.concatenate([z[np.isfinite(z)] for z in heights])
    low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
    if high - low < LEAST_RANGE:  # avoid an empty range
        low, high = low - LEAST_RANGE / 2, high + LEAST_RANGE / 2
    scale = Scale(low, high, _ticks(low, high) if len(found) else [])
    parts = [(name, reading, z) for (name, reading), z in zip(models, heights, strict=True)]
    return {
        "landscape_contour": _contour(parts, scale, images),
        "landscape_surface": _surface(parts, scale, images),
    }


def _heights(readings: list[LandscapeReading]) -> list[Array]:
    """Decimal logarithms of the losses, (grid, grid) each; NaN if a loss is unknown, NaN or infinite."""
    losses = [
        np.array([[math.nan if v is None else v for v in row] for row in reading.loss], dtype=np.float64)
        for reading in readings
    ]
    positive = np.concatenate([loss[np.isfinite(loss) & (loss > 0)] for loss in losses])
    least = positive.min() if len(positive) else LEAST
    return [np.log10(np.maximum(np.where(np.isfinite(loss), loss, math.nan), least)) for loss in losses]


def _contour(parts: list[Part], scale: Scale, images: str) -> "Figure":
    from matplotlib.ticker import FuncFormatter

    figure = new_figure(PANEL * len(parts) + 1.1, 5.1)
    put_title(figure, TITLE, images)
    axes: Any = figure.subplots(1, len(parts), squeeze=False, sharex=True, sharey=True)[0]
    edge = (scale.high - scale.low) / 1e6  # include the lowest and the highest loss
    levels = np.linspace(scale.low - edge, scale.high + edge, LEVELS)
    for index, (ax, (name, reading, z)) in enumerate(zip(axes, parts, strict=True)):
        axis, masked = np.array(reading.axis), np.ma.masked_invalid(z)
        ax.set_facecolor(FAINT)
        image = ax.contourf(axis, axis, masked, levels=levels, cmap=MAP, vmin=scale.low, vmax=scale.high)
        lines = ax.contour(
            axis, axis, masked, levels=scale.ticks, colors="white", linewidths=0.7, linestyles="solid"
        )
        ax.set_xlim(-reading.span, reading.span)
        ax.set_ylim(-reading.span, reading.span)
        places = _places(lines.allsegs, reading.span)
        if places:  # with an empty list clabel chooses places itself, also at the edges
            number = FuncFormatter(lambda v, _: _number(10**v))
            ax.clabel(lines, fmt=number, fontsize=7, manual=places)
        ax.plot(0, 0, marker="+", markersize=9, markeredgewidth=1.6, color="white")
        center = reading.loss[reading.grid // 2][reading.grid // 2]
        at_center = "NaN or infinite" if center is None else _number(center)
        ax.set_title(f"{shortened_to_width(name, NAME)}\nloss at the center (+): {at_center}")
        ax.set_xlabel("along direction 1 (filter norms)")
        if index == 0:
            ax.set_ylabel("along direction 2 (filter norms)")
        ax.set_xticks(np.linspace(-reading.span, reading.span, 5))
        ax.set_yticks(np.linspace(-reading.span, reading.span, 5))
        ax.set_aspect("equal")
    _color_bar(figure, image, axes, scale, shrink=0.9, pad=0.03)
    _unknown(figure, parts, facecolor=FAINT)
    return figure


def _places(segments: list[list[Array]], span: float) -> list[tuple[float, float]]:
    """Positions of contour labels: on whole contours, apart from each other, away from edges and center."""
    size = 2 * span
    taken = [np.zeros(2)]  # the model's mark
    for points in (points for level in segments for points in level):
        if len(points) < 2 or max(np.ptp(points, axis=0)) < APART * size:
            continue  # shorter than its label
        inside = points[(np.abs(points) <= span - MARGIN * size).all(axis=1)]
        if not len(inside):
            continue
        free = np.min([np.linalg.norm(inside - other, axis=1) for other in taken], axis=0)
        if free.max() >= APART * size:
            taken.append(inside[free.argmax()])
    return [(float(x), float(y)) for x, y in taken[1:]]


def _surface(parts: list[Part], scale: Scale, images: str) -> "Figure":
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from mpl_toolkits import mplot3d  # noqa: F401  (registers the 3d projection)

    figure = new_figure((PANEL + 0.7) * len(parts) + 1.0, 5.0)
    put_title(figure, TITLE, images)
    axes: Any = figure.subplots(1, len(parts), squeeze=False, subplot_kw={"projection": "3d"})[0]
    colors = ScalarMappable(Normalize(scale.low, scale.high), MAP)
    longest = max(map(len, scale.numbers), default=2)
    for ax, (name, reading, z) in zip(axes, parts, strict=True):
        axis, fine = _finer(np.array(reading.axis), z)
        x, y = np.meshgrid(axis, axis)
        ax.plot_surface(
            x,
            y,
            fine,
            cmap=MAP,
            norm=colors.norm,
            rcount=len(axis),
            ccount=len(axis),
            linewidth=0,
            rasterized=True,  # thousands of faces would make a large SVG
        )
        ax.set_zlim(scale.low, scale.high)
        ax.set_zticks(scale.ticks, scale.numbers)
        ax.set_title(shortened_to_width(name, NAME), y=0.98)
        ax.set_xlabel("direction 1 (filter norms)", labelpad=0, fontsize=8)
        ax.set_ylabel("direction 2 (filter norms)", labelpad=0, fontsize=8)
        ax.set_zlabel(AXIS, labelpad=longest - 2, fontsize=8)
        for set_ticks in (ax.set_xticks, ax.set_yticks):
            set_ticks(np.linspace(-reading.span, reading.span, 5))
        ax.tick_params(pad=-2, labelsize=7)
        ax.tick_params(axis="z", pad=longest - 2)  # its numbers are centered
        ax.view_init(elev=34, azim=-56)
        for side in (ax.xaxis, ax.yaxis, ax.zaxis):
            side.set_pane_color((0.97, 0.97, 0.97, 1.0))
            side._axinfo["grid"].update(color=(0.85, 0.85, 0.85, 1.0), linewidth=0.5)
        ax.set_box_aspect((1, 1, 0.72), zoom=0.86)  # leaves room for numbers and names
        ax.patch.set_visible(False)  # that of a second model would cover numbers of the first
    _color_bar(figure, colors, axes, scale, shrink=0.7, pad=0.05)
    _unknown(figure, parts, facecolor="none", edgecolor=INK)
    return figure


def _finer(axis: Array, z: Array) -> tuple[Array, Array]:
    """``z`` and its axis, linearly interpolated, for smooth colors."""
    factor = max(1, FINE // (len(axis) - 1))
    fine = np.linspace(axis[0], axis[-1], factor * (len(axis) - 1) + 1)
    rows = np.array([np.interp(fine, axis, row) for row in z])
    return fine, np.array([np.interp(fine, axis, column) for column in rows.T]).T


def _color_bar(figure: "Figure", image: Any, axes: Any, scale: Scale, *, shrink: float, pad: float) -> None:
    bar = figure.colorbar(image, ax=list(axes), shrink=shrink, pad=pad)
    bar.set_ticks(scale.ticks, labels=scale.numbers)
    bar.minorticks_off()
    bar.set_label(AXIS)


def _unknown(figure: "Figure", parts: list[Part], **colors: Any) -> None:
    """Add a legend for gaps, if there are any."""
    from matplotlib.patches import Patch

    if any(np.isnan(z).any() for _, _, z in parts):
        put_legend(figure, [Patch(label="gap: the loss is NaN or infinite", **colors)])


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
    """At most four significant digits."""
    return f"{value:.4g}"
