"""Eigenvalues, traces and flips as bars and dots: a row a layer, in execution order, two models beside each other."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from saqcli.algorithms.instruments.eigenvalue import EigenvalueReading
from saqcli.algorithms.instruments.flips import FlipsReading
from saqcli.algorithms.instruments.hessian_trace import TraceReading
from saqcli.units import with_error
from saqcli.workflows.pictures.canvas import (
    COLOURS,
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

ROW, PAIR = 0.2, 0.3  # inches a layer, of one model and of two
MOST_TICKS = 6
LEAST_SHARE = 0.1  # percent; below it the axis of shares is linear


def paint_eigenvalue(subjects: list[tuple[str, EigenvalueReading]], images: str = "") -> "dict[str, Figure]":
    """``eigenvalue``: a bar a model, a dot a start."""
    from matplotlib.lines import Line2D

    figure = new_figure(6.4, 1.55 + 0.45 * len(subjects))
    ax: Any = figure.subplots()
    every = [start.eigenvalue for _, reading in subjects for start in reading.starts]
    values = [value for value in every if math.isfinite(value)]
    reach = max(map(abs, values), default=0.0) or 1.0
    for row, (_, reading) in enumerate(subjects):
        ax.barh(row, reading.eigenvalue, height=0.55, color=COLOURS[row % 2], alpha=0.8)
        found = [start.eigenvalue for start in reading.starts]
        ax.scatter(found, [row] * len(found), s=16, color="white", edgecolors=INK, linewidths=0.7, zorder=3)
        text = with_error(reading.eigenvalue, reading.spread, "\nspread ")
        if not all(start.converged for start in reading.starts):
            text += ", not converged"
        right = max([0.0, *(value for value in found if math.isfinite(value))])
        ax.text(right + 0.04 * reach, row, text, va="center", fontsize=7.5)
    ax.set_yticks(range(len(subjects)), [shortened(name) for name, _ in subjects])
    ax.invert_yaxis()
    low = min([0.0, *values])
    ax.set_xlim(1.1 * low, 1.9 * max([reach / 5, *values]))
    ax.set_xlabel("largest eigenvalue of the Hessian over the quantized weights")
    ax.tick_params(axis="y", length=0)
    put_title(figure, of_images("Largest Hessian eigenvalue", images))
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


def paint_trace(subjects: list[tuple[str, TraceReading]], images: str = "") -> "dict[str, Figure]":
    """``trace``: of every layer's block, as it is and per weight, with standard errors."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    panels = []
    for _, reading in subjects:
        panels.append(
            (
                [layer.name for layer in reading.layers],
                [(layer.trace, layer.standard_error) for layer in reading.layers],
                [(layer.per_weight, layer.standard_error / layer.weights) for layer in reading.layers],
            )
        )
    rows = _rows([panel[0] for panel in panels])
    figure = new_figure(9.0, 1.9 + _height(rows, len(subjects)))
    axes: Any = figure.subplots(1, 2, sharey=True)
    for k, label in ((1, "trace of the layer's Hessian block"), (2, "trace per weight")):
        ax = axes[k - 1]
        found: list[Any] = [dict(zip(panel[0], panel[k], strict=True)) for panel in panels]
        _bars(
            ax, rows, [{n: v for n, (v, _) in one.items()} for one in found], [name for name, _ in subjects]
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
            ax.xaxis.set_major_formatter("{x:g}")  # powers would be mathematics, which is off
            ax.xaxis.set_minor_formatter(NullFormatter())
        else:
            ax.xaxis.set_major_locator(MaxNLocator(MOST_TICKS))
    _name_rows(axes[0], rows)
    _title(figure, subjects, of_images("Hessian trace, layer by layer", images))
    put_legend(figure, axes[0].get_legend_handles_labels()[0])
    return {"trace": figure}


def paint_flips(subjects: list[tuple[str, FlipsReading]], images: str = "") -> "dict[str, Figure]":
    """``flips``: share of the weights whose code changes; nothing where no latent weights were there."""
    measured = [(name, reading) for name, reading in subjects if reading.reason is None and reading.layers]
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
        ax.scatter(shares, at, s=26, color=COLOURS[index % 2], zorder=3, label=label, clip_on=False)
        expected = "expected: mean |e| / gap between levels" if index == len(measured) - 1 else None
        ax.scatter(
            sizes, at, marker="|", s=40, color=INK, linewidths=1.1, zorder=2, label=expected, clip_on=False
        )
    ax.set_xscale("symlog", linthresh=LEAST_SHARE, linscale=0.4)
    ax.set_xlim(0, 100)
    ax.set_xticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    ax.minorticks_off()
    ax.set_xlabel("weights whose code changes, in % of the layer's")
    _name_rows(ax, rows)
    first = measured[0][1]
    unit = "deviations" if first.rho_unit == "deviation" else "absolute"
    text = f"Flips under a perturbation of radius {first.rho:g} ({unit})"
    _title(figure, measured, of_images(text, images))
    put_legend(figure, ax.get_legend_handles_labels()[0])
    return {"flips": figure}


def _rows(layers: list[list[str]]) -> list[str]:
    """Names of all layers, those of the first model first."""
    return list(dict.fromkeys(name for names in layers for name in names))


def _height(rows: list[str], models: int) -> float:
    """Inches that all rows take."""
    return (ROW if models == 1 else PAIR) * len(rows)


def _stripes(ax: Any, rows: list[str]) -> None:
    """Every other row grey, to be followed with the eye."""
    for row in range(0, len(rows), 2):
        ax.axhspan(row - 0.5, row + 0.5, color="#F3F3F3", zorder=0)


def _place(row: int, index: int, count: int) -> float:
    """Where the bar of model ``index`` of ``count`` lies in a row."""
    return row + (index - (count - 1) / 2) * 0.8 / count


def _bars(ax: Any, rows: list[str], values: list[dict[str, float]], names: list[str]) -> None:
    for index, found in enumerate(values):
        at = [_place(rows.index(name), index, len(values)) for name in found]
        label = shortened(names[index]) if len(values) > 1 else None
        ax.barh(
            at,
            list(found.values()),
            height=0.72 / len(values),
            color=COLOURS[index % 2],
            alpha=0.85,
            label=label,
        )
    ax.grid(axis="x", color=FAINT, linewidth=0.4, alpha=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)


def _name_rows(ax: Any, rows: list[str]) -> None:
    """Names of the layers, top down."""
    ax.set_yticks(range(len(rows)), [shortened(name) for name in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)


def _title(figure: "Figure", subjects: Sequence[tuple[str, object]], text: str) -> None:
    """With the model's name where there is only one, and no legend therefore names it."""
    put_title(figure, *([subjects[0][0]] if len(subjects) == 1 else []), text)
