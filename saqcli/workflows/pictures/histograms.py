"""Weights and inputs of every layer against their grids: small multiples, a panel a layer."""

from typing import TYPE_CHECKING, Any

import numpy as np

from saqcli.algorithms.instruments.distributions import DistributionsReading, Operand
from saqcli.workflows.pictures.canvas import (
    ACCENT,
    COLOURS,
    FAINT,
    new_figure,
    of_images,
    put_legend,
    put_title,
    shortened,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 5
CLEAR = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5}  # behind text
MOST_LINES = 16  # grids with more codes show their two ends only
LEAST_WIDTH = 5.6  # inches that title and legend take
SPLIT = 0.5  # of a panel, beyond which there is text in its upper part
LINE: dict[str, Any] = {"color": FAINT, "linewidth": 0.5}  # at a code
END: dict[str, Any] = {"color": "#444444", "linewidth": 0.8, "linestyle": (0, (3, 2))}  # at an outermost one


def paint_distributions(
    subjects: list[tuple[str, DistributionsReading]], images: str = ""
) -> "dict[str, Figure]":
    """``distributions_weights`` and ``distributions_inputs``; with ``_against`` for the second model."""
    figures = {}
    for suffix, (name, reading) in zip(("", "_against"), subjects, strict=False):
        for kind in ("weights", "inputs"):
            panels = [(layer.name, getattr(layer, kind)) for layer in reading.layers]
            found = [(layer, operand) for layer, operand in panels if operand is not None]
            if found:
                text = "Weights against their grids" if reading.latent else "Quantized weights on their grids"
                if kind == "inputs":
                    text = of_images("Layer inputs against their grids", images)
                figures[f"distributions_{kind}{suffix}"] = _figure((name, text), found)
    return figures


def _figure(title: tuple[str, str], panels: list[tuple[str, Operand]]) -> "Figure":
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(max(LEAST_WIDTH, 2.15 * columns), 1.45 + 1.5 * rows)
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
        Patch(facecolor=COLOURS[0], label="within the grid"),
        Patch(facecolor=ACCENT, label="clipped"),
        Line2D([], [], label="outermost codes", **END),
    ]
    if any(len(_codes(operand)) <= MOST_LINES for _, operand in panels):
        marks.append(Line2D([], [], label="code", **LINE))
    put_legend(figure, marks)
    return figure


def _codes(operand: Operand) -> range:
    return range(operand.lowest, operand.highest + 1, operand.stride)


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
    for mask, colour in ((~outside, COLOURS[0]), (outside, ACCENT)):
        ax.stairs(np.where(mask, shares, 0.0), edges, fill=True, color=colour, zorder=2)
    # One spike, such as the zeros behind a ReLU, would hide all else: it may run out of the panel.
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
