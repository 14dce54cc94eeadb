"""Plots of the readings of an analysis: bars, heat maps, histograms.

A painter takes the readings of one model, or of two to be compared, each with the model's name, and the images of the
readings ("500 training images", or "" if unknown); it returns figures by name. To add one, write it in this file and
add it to the table ``PAINTERS``. An instrument of another package brings its own (``Instrument.paint``).

Eigenvalues, traces and flips are bars and dots, one row per layer in execution order, with two models side by side.
Sensitivity is two heat maps: the changes of loss and accuracy when a single layer has other bits. Distributions of
weights and inputs on their grids are small multiples, one panel per layer.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saqcli.analysis import INSTRUMENTS, Painter, Reading
from saqcli.analysis.distributions import DistributionsReading, Operand
from saqcli.analysis.eigenvalue import EigenvalueReading
from saqcli.analysis.flips import FlipsReading
from saqcli.analysis.hessian_trace import TraceReading
from saqcli.analysis.sensitivity import SensitivityReading
from saqcli.report.canvas import (
    ACCENT,
    COLORS,
    FAINT,
    INK,
    new_figure,
    put_legend,
    put_title,
    save,
    shortened,
    style,
    with_images,
)
from saqcli.report.landscape import paint_landscape
from saqcli.units import with_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW, PAIR = 0.2, 0.3  # inches per layer, for one model and for two
MOST_TICKS = 6
MIN_SHARE = 0.1  # percent; below it the axis of shares is linear
Array = NDArray[np.float64]
MAP = "PuOr"  # diverging, color-blind-safe; orange is worse
HEATMAP_ROW = 0.235  # inches per layer
BAR = 0.11  # thickness of a color bar in inches
NEGLIGIBLE = 1e-5  # changes below this share of the largest one are written as 0
WIDE_PANEL = 3  # candidates from which a panel has room for five numbers at its color bar
LINEAR_RATIO = 100  # colors are linear below 1/LINEAR_RATIO of the largest change of the loss
COLUMNS = 5
CLEAR = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5}  # box behind text
MOST_LINES = 16  # grids with more codes show only their two ends
MIN_WIDTH = 5.6  # inches for title and legend
SPLIT = 0.5  # share of a panel's width beyond which its upper part contains text
LINE: dict[str, Any] = {"color": FAINT, "linewidth": 0.5}  # at a code
END: dict[str, Any] = {"color": "#444444", "linewidth": 0.8, "linestyle": (0, (3, 2))}  # at an outermost code


def paint_eigenvalue(readings: list[tuple[str, EigenvalueReading]], images: str = "") -> "dict[str, Figure]":
    """Figure ``eigenvalue``: one bar per model, one dot per start."""
    from matplotlib.lines import Line2D

    figure = new_figure(6.4, 1.55 + 0.45 * len(readings))
    ax: Any = figure.subplots()
    every = [start.eigenvalue for _, reading in readings for start in reading.starts]
    values = [value for value in every if math.isfinite(value)]
    reach = max(map(abs, values), default=0.0) or 1.0
    for row, (_, reading) in enumerate(readings):
        ax.barh(row, reading.eigenvalue, height=0.55, color=COLORS[row % 2], alpha=0.8)
        found = [start.eigenvalue for start in reading.starts]
        ax.scatter(found, [row] * len(found), s=16, color="white", edgecolors=INK, linewidths=0.7, zorder=3)
        text = with_error(reading.eigenvalue, reading.spread, "\nspread ")
        if not all(start.converged for start in reading.starts):
            text += ", not converged"
        right = max([0.0, *(value for value in found if math.isfinite(value))])
        ax.text(right + 0.04 * reach, row, text, va="center", fontsize=7.5)
    ax.set_yticks(range(len(readings)), [shortened(name) for name, _ in readings])
    ax.invert_yaxis()
    low = min([0.0, *values])
    ax.set_xlim(1.1 * low, 1.9 * max([reach / 5, *values]))
    ax.set_xlabel("largest eigenvalue of the Hessian over the quantized weights")
    ax.tick_params(axis="y", length=0)
    put_title(figure, with_images("Largest Hessian eigenvalue", images))
    dot: dict[str, Any] = {
        "marker": "o",
        "color": "white",
        "markeredgecolor": INK,
        "markeredgewidth": 0.7,
        "markersize": 4,
    }
    label = "one start of the power iteration; the bar is the largest"
    put_legend(figure, [Line2D([], [], linestyle="none", label=label, **dot)])
    return {"eigenvalue": figure}


def paint_trace(readings: list[tuple[str, TraceReading]], images: str = "") -> "dict[str, Figure]":
    """Figure ``trace``: every layer's trace, total and per weight, with standard errors."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    panels = []
    for _, reading in readings:
        panels.append(
            (
                [layer.name for layer in reading.layers],
                [(layer.trace, layer.standard_error) for layer in reading.layers],
                [(layer.per_weight, layer.standard_error / layer.weights) for layer in reading.layers],
            )
        )
    rows = _rows([panel[0] for panel in panels])
    figure = new_figure(9.0, 1.9 + _height(rows, len(readings)))
    axes: Any = figure.subplots(1, 2, sharey=True)
    for k, label in ((1, "trace of the layer's Hessian block"), (2, "trace per weight")):
        ax = axes[k - 1]
        found: list[Any] = [dict(zip(panel[0], panel[k], strict=True)) for panel in panels]
        _bars(
            ax, rows, [{n: v for n, (v, _) in one.items()} for one in found], [name for name, _ in readings]
        )
        for index, one in enumerate(found):
            at = [_place(rows.index(n), index, len(found)) for n in one]
            ax.errorbar(
                [v for v, _ in one.values()], at, xerr=[e for _, e in one.values()],
                fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5,
                label="± standard error" if index == len(found) - 1 else None,
            )  # fmt: skip
        ax.set_xlabel(label)
        if k == 2 and all(v > 0 for one in found for v, _ in one.values()):
            ax.set_xscale("log")
            every = [v for one in found for v, _ in one.values()]
            subs = (1.0,) if max(every) > 50 * min(every) else (1.0, 2.0, 5.0)
            ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=MOST_TICKS))
            ax.xaxis.set_major_formatter("{x:g}")  # the default format needs math text, which is off
            ax.xaxis.set_minor_formatter(NullFormatter())
        else:
            ax.xaxis.set_major_locator(MaxNLocator(MOST_TICKS))
    _name_rows(axes[0], rows)
    _title(figure, readings, with_images("Hessian trace, layer by layer", images))
    put_legend(figure, axes[0].get_legend_handles_labels()[0])
    return {"trace": figure}


def paint_flips(readings: list[tuple[str, FlipsReading]], images: str = "") -> "dict[str, Figure]":
    """Figure ``flips``: share of the weights whose code changes; none without latent weights."""
    measured = [(name, reading) for name, reading in readings if reading.reason is None and reading.layers]
    if not measured:
        return {}
    rows = _rows([[layer.name for layer in reading.layers] for _, reading in measured])
    figure = new_figure(6.6, 1.9 + _height(rows, len(measured)))
    ax: Any = figure.subplots()
    _stripes(ax, rows)
    for index, (name, reading) in enumerate(measured):
        at = [_place(rows.index(layer.name), index, len(measured)) for layer in reading.layers]
        shares = [100 * layer.share for layer in reading.layers]
        sizes = [100 * min(layer.relative_size, 1.0) for layer in reading.layers]
        label = shortened(name) if len(measured) > 1 else "weights that flip"
        ax.scatter(shares, at, s=26, color=COLORS[index % 2], zorder=3, label=label, clip_on=False)
        expected = "expected: mean |e| / gap between levels" if index == len(measured) - 1 else None
        ax.scatter(
            sizes, at, marker="|", s=40, color=INK, linewidths=1.1, zorder=2, label=expected, clip_on=False
        )
    ax.set_xscale("symlog", linthresh=MIN_SHARE, linscale=0.4)
    ax.set_xlim(0, 100)
    ax.set_xticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    ax.minorticks_off()
    ax.set_xlabel("weights whose code changes, in % of the layer's")
    _name_rows(ax, rows)
    first = measured[0][1]
    unit = "deviations" if first.rho_unit == "deviation" else "absolute"
    text = f"Flips under a perturbation of radius {first.rho:g} ({unit})"
    _title(figure, measured, with_images(text, images))
    put_legend(figure, ax.get_legend_handles_labels()[0])
    return {"flips": figure}


def _rows(layers: list[list[str]]) -> list[str]:
    """Names of all layers, those of the first model first."""
    return list(dict.fromkeys(name for names in layers for name in names))


def _height(rows: list[str], models: int) -> float:
    """Height of all rows in inches."""
    return (ROW if models == 1 else PAIR) * len(rows)


def _stripes(ax: Any, rows: list[str]) -> None:
    """Shade every other row."""
    for row in range(0, len(rows), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#F3F3F3", zorder=0)


def _place(row: int, index: int, count: int) -> float:
    """Position of the bar of model ``index`` of ``count`` in a row."""
    return row + (index - (count - 1) / 2) * 0.8 / count


def _bars(ax: Any, rows: list[str], values: list[dict[str, float]], names: list[str]) -> None:
    for index, found in enumerate(values):
        at = [_place(rows.index(name), index, len(values)) for name in found]
        label = shortened(names[index]) if len(values) > 1 else None
        ax.barh(
            at,
            list(found.values()),
            height=0.72 / len(values),
            color=COLORS[index % 2],
            alpha=0.85,
            label=label,
        )
    ax.grid(axis="x", color=FAINT, linewidth=0.4, alpha=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)


def _name_rows(ax: Any, rows: list[str]) -> None:
    """Label the rows with layer names, top down."""
    ax.set_yticks(range(len(rows)), [shortened(name) for name in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)


def _title(figure: "Figure", readings: Sequence[tuple[str, object]], text: str) -> None:
    """Set the title, with the model's name if there is only one, since no legend names it."""
    put_title(figure, *([readings[0][0]] if len(readings) == 1 else []), text)


def paint_sensitivity(
    readings: list[tuple[str, SensitivityReading]], images: str = ""
) -> "dict[str, Figure]":
    """Figures ``sensitivity``, and ``sensitivity_against`` for the second model, on the same scales."""
    tables = [_tables(reading) for _, reading in readings]
    limits = [_limit(pair[k] for pair in tables) for k in range(2)]
    keys = ("sensitivity", "sensitivity_against")
    return {
        key: _heatmap_figure(name, reading, pair, limits, images)
        for key, (name, reading), pair in zip(keys, readings, tables, strict=False)
    }


def _tables(reading: SensitivityReading) -> tuple[Array, Array]:
    """Changes of loss and of top-1, (layers, candidates); NaN if the loss was NaN or infinite."""
    loss = [[c.loss_change for c in layer.candidates] for layer in reading.layers]
    top1 = [[c.top1_change for c in layer.candidates] for layer in reading.layers]
    return np.array(loss, dtype=np.float64), np.array(top1, dtype=np.float64)


def _limit(tables: Any) -> float:
    """The largest finite change in any of the tables; 1 if nothing changes."""
    return max((float(np.abs(t[np.isfinite(t)]).max(initial=0.0)) for t in tables), default=0.0) or 1.0


def _heatmap_figure(
    name: str, reading: SensitivityReading, tables: tuple[Array, Array], limits: list[float], images: str
) -> "Figure":
    import matplotlib
    from matplotlib.colors import Normalize, SymLogNorm
    from matplotlib.patches import Patch, Rectangle

    bits = [candidate.bits for candidate in reading.layers[0].candidates]
    rows = len(reading.layers)
    figure = new_figure(3.4 + 2 * (0.62 * len(bits) + 0.9), 2.3 + HEATMAP_ROW * rows)
    put_title(
        figure,
        name,
        "One layer at other bits, all others unchanged",
        with_images(f"unchanged: loss {reading.loss:.4g}, top-1 {reading.top1:.2f} %", images),
    )
    figure.set_layout_engine("constrained", wspace=0.05)  # between the numbers of the two color bars
    axes: Any = figure.subplots(2, 2, sharey="row", height_ratios=(HEATMAP_ROW * rows, BAR))
    loss_scale = SymLogNorm(limits[0] / LINEAR_RATIO, vmin=-limits[0], vmax=limits[0])
    panels = (
        (tables[0], f"{MAP}_r", loss_scale, 1 / 10, "change of the loss", "{:+.2g}"),
        (tables[1], MAP, Normalize(-limits[1], limits[1]), 1 / 2, "change of top-1, in points", "{:+.1f}"),
    )
    framed = unknown = False
    for k, (values, colors, norm, half, title, form) in enumerate(panels):
        ax, limit = axes[0][k], limits[k]
        image = ax.imshow(
            np.ma.masked_invalid(values),
            norm=norm,
            cmap=matplotlib.colormaps[colors].with_extremes(bad=FAINT),
            aspect="auto",
        )
        for (row, column), value in np.ndenumerate(values):
            known = bool(np.isfinite(value))
            dark = known and abs(float(norm(value)) - 0.5) > 0.32
            text = form.format(value) if abs(value) > NEGLIGIBLE * limit else "0"
            text = text if known and float(text) != 0 else "0" if known else "NaN"
            color = "white" if dark else INK
            ax.text(column, row, text, ha="center", va="center", fontsize=6.5, color=color)
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
        shares = (-1, -half, 0, half, 1) if len(bits) >= WIDE_PANEL else (-1, 0, 1)
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


def paint_distributions(
    readings: list[tuple[str, DistributionsReading]], images: str = ""
) -> "dict[str, Figure]":
    """Figures ``distributions_weights`` and ``distributions_inputs``; with ``_against`` for the second model."""
    figures = {}
    for suffix, (name, reading) in zip(("", "_against"), readings, strict=False):
        for kind in ("weights", "inputs"):
            panels = [(layer.name, getattr(layer, kind)) for layer in reading.layers]
            found = [(layer, operand) for layer, operand in panels if operand is not None]
            if found:
                text = "Weights against their grids" if reading.latent else "Quantized weights on their grids"
                if kind == "inputs":
                    text = with_images("Layer inputs against their grids", images)
                figures[f"distributions_{kind}{suffix}"] = _histogram_figure((name, text), found)
    return figures


def _histogram_figure(title: tuple[str, str], panels: list[tuple[str, Operand]]) -> "Figure":
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(max(MIN_WIDTH, 2.15 * columns), 1.45 + 1.5 * rows)
    put_title(figure, *title)
    axes: Any = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (name, operand) in zip(axes, panels, strict=False):
        _panel(ax, name, operand)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[max(len(panels) - columns, 0) : len(panels)]:  # the lowest of each column
        ax.set_xlabel("value / step (codes)", fontsize=7)
    figure.supylabel("share of values", fontsize=8.5)
    marks: list[Any] = [
        Patch(facecolor=COLORS[0], label="within the grid"),
        Patch(facecolor=ACCENT, label="clipped"),
        Line2D([], [], label="outermost codes", **END),
    ]
    if any(len(_codes(operand)) <= MOST_LINES for _, operand in panels):
        marks.append(Line2D([], [], label="code", **LINE))
    put_legend(figure, marks)
    return figure


def _codes(operand: Operand) -> Sequence[float]:
    if operand.table is not None:
        return operand.table
    assert operand.stride is not None
    return range(int(operand.lowest), int(operand.highest) + 1, operand.stride)


def _panel(ax: Any, name: str, operand: Operand) -> None:
    edges = np.linspace(*operand.edges, len(operand.histogram) + 1)
    shares = np.array(operand.histogram)
    middles = (edges[:-1] + edges[1:]) / 2
    outside = (middles > operand.highest) | (middles < operand.lowest)
    codes = _codes(operand)
    if len(codes) <= MOST_LINES:
        for code in codes:
            ax.axvline(code, zorder=0, **LINE)
    for code in (operand.lowest, operand.highest):
        ax.axvline(code, zorder=1, **END)
    for mask, color in ((~outside, COLORS[0]), (outside, ACCENT)):
        ax.stairs(np.where(mask, shares, 0.0), edges, fill=True, color=color, zorder=2)
    # A spike, such as the zeros behind a ReLU, would hide all other bars: it may exceed the panel.
    rest = np.sort(shares)[-2] if len(shares) > 1 else shares.max()
    top = min(shares.max(), max(4 * rest, 1e-9)) or 1.0
    ax.set_ylim(0, 1.08 * top)
    if shares.max() > top:
        at = middles[shares.argmax()]
        right = at > edges[0] + SPLIT * (edges[-1] - edges[0])  # below the text there
        ax.annotate(
            f"{100 * shares.max():.0f} %",
            (at, (0.6 if right else 1.04) * top),
            xytext=(-4 if right else 4, -2),
            textcoords="offset points",
            fontsize=6,
            ha="right" if right else "left",
            va="top",
        )
    ax.set_xlim(*operand.edges)
    ax.set_title(shortened(name), fontsize=8)
    text = f"{operand.bits} bits\n{100 * operand.clipped:.2g} % clipped\nentropy {operand.entropy:.1f} bits"
    ax.text(
        0.985,
        0.96,
        text,
        transform=ax.transAxes,
        ha="right",
        va="top",
        fontsize=6,
        linespacing=1.25,
        bbox=CLEAR,
    )
    ax.set_yticks([])
    ax.tick_params(axis="x", labelsize=6.5, length=2)
    ax.spines["left"].set_visible(False)


def bars_by_layer(values: list[tuple[str, dict[str, float]]], axis: str, title: str) -> "Figure":
    """Bars, one row per layer; two models side by side.

    Args:
        values: of every layer by name, with the model's name, for one model or two.
        axis: label of the values, with their unit.
        title: below the model's name.
    """
    rows = _rows([list(layers) for _, layers in values])
    figure = new_figure(6.6, 1.9 + _height(rows, len(values)))
    ax: Any = figure.subplots()
    _bars(ax, rows, [layers for _, layers in values], [name for name, _ in values])
    ax.set_xlabel(axis)
    _name_rows(ax, rows)
    _title(figure, values, title)
    put_legend(figure, ax.get_legend_handles_labels()[0])
    return figure


PAINTERS: dict[str, Painter] = {
    "eigenvalue": paint_eigenvalue,
    "trace": paint_trace,
    "flips": paint_flips,
    "distributions": paint_distributions,
    "sensitivity": paint_sensitivity,
    "landscape": paint_landscape,
}


def painter_of(instrument: str) -> Painter | None:
    """The painter of an instrument in ``INSTRUMENTS``; None if it has no plot."""
    return INSTRUMENTS[instrument].paint or PAINTERS.get(instrument)


def draw(instrument: str, readings: list[tuple[str, Reading]], folder: Path, images: str = "") -> list[Path]:
    """Draw the readings of an instrument to files.

    Args:
        instrument: name in ``INSTRUMENTS``.
        readings: names and readings of one or two models.
        folder: of the files.
        images: of the readings, such as "500 training images".

    Returns:
        Paths of the files written; empty for an instrument without a plot.
    """
    painter = painter_of(instrument)
    if painter is None:
        return []
    with style():
        with INSTRUMENTS.blamed(instrument):
            figures = dict(painter(readings, images))
        return [path for name, figure in figures.items() for path in save(figure, folder / name)]
