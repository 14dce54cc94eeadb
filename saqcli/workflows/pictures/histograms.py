"""Weights and inputs of every layer against their grids: small multiples, a panel a layer."""

from typing import TYPE_CHECKING, Any

import numpy as np

from saqcli.algorithms.instruments.distributions import DistributionsReading, Operand
from saqcli.workflows.pictures.canvas import ACCENT, COLOURS, FAINT, new_figure, shortened, titles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 5
CLEAR = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5}  # behind text
MOST_LINES = 16  # grids with more codes show their two ends only


def paint_distributions(subjects: list[tuple[str, DistributionsReading]]) -> "dict[str, Figure]":
    """``distributions_weights`` and ``distributions_inputs``; with ``_against`` for the second model."""
    names = titles([target for target, _ in subjects])
    figures = {}
    for suffix, name, (_, reading) in zip(("", "_against"), names, subjects, strict=False):
        for kind in ("weights", "inputs"):
            panels = [(layer.name, getattr(layer, kind)) for layer in reading.layers]
            found = [(layer, operand) for layer, operand in panels if operand is not None]
            if found:
                what = "weights" if kind == "inputs" or reading.latent else "quantized weights"
                what = "layer inputs" if kind == "inputs" else what
                figures[f"distributions_{kind}{suffix}"] = _figure(
                    f"{name}: {what} against their grids", found
                )
    return figures


def _figure(title: str, panels: list[tuple[str, Operand]]) -> "Figure":
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(max(4.5, 2.15 * columns), 1.0 + 1.5 * rows)
    figure.suptitle(title, fontsize=11)
    axes: Any = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (name, operand) in zip(axes, panels, strict=False):
        _panel(ax, name, operand)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.supxlabel("value in codes (value / step); dashed: outermost codes, orange: clipped", fontsize=8.5)
    figure.supylabel("share of values", fontsize=8.5)
    return figure


def _panel(ax: Any, name: str, operand: Operand) -> None:
    edges = np.linspace(*operand.edges, len(operand.histogram) + 1)
    shares = np.array(operand.histogram)
    middles = (edges[:-1] + edges[1:]) / 2
    outside = (middles > operand.highest) | (middles < operand.lowest)
    codes = range(operand.lowest, operand.highest + 1, operand.stride)
    if len(codes) <= MOST_LINES:
        for code in codes:
            ax.axvline(code, color=FAINT, linewidth=0.5, zorder=0)
    for code in (operand.lowest, operand.highest):
        ax.axvline(code, color="#444444", linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
    for mask, colour in ((~outside, COLOURS[0]), (outside, ACCENT)):
        ax.stairs(np.where(mask, shares, 0.0), edges, fill=True, color=colour, zorder=2)
    # One spike, such as the zeros behind a ReLU, would hide all else: it may run out of the panel.
    rest = np.sort(shares)[-2] if len(shares) > 1 else shares.max()
    top = min(shares.max(), max(4 * rest, 1e-9))
    ax.set_ylim(0, 1.08 * top)
    if shares.max() > top:
        at = middles[shares.argmax()]
        ax.annotate(
            f"{100 * shares.max():.0f} %",
            (at, 1.04 * top),
            xytext=(4, -2),
            textcoords="offset points",
            fontsize=6,
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
