"""Eigenvalues, traces and flips as bars and dots: a row a layer, in execution order, two models beside each other."""

from typing import TYPE_CHECKING, Any

from saqcli.algorithms.instruments.eigenvalue import EigenvalueReading
from saqcli.algorithms.instruments.flips import FlipsReading
from saqcli.algorithms.instruments.hessian_trace import TraceReading
from saqcli.workflows.pictures.canvas import COLOURS, FAINT, INK, new_figure, shortened, titles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW, PAIR = 0.2, 0.3  # inches a layer, of one model and of two
LEAST_SHARE = 0.1  # percent; below it the axis of shares is linear


def paint_eigenvalue(subjects: list[tuple[str, EigenvalueReading]]) -> "dict[str, Figure]":
    """``eigenvalue``: a bar a model, a dot a start."""
    names = titles([target for target, _ in subjects])
    figure = new_figure(6.4, 1.25 + 0.45 * len(subjects))
    ax: Any = figure.subplots()
    reach = max(abs(reading.eigenvalue) for _, reading in subjects) or 1.0
    for row, (_, reading) in enumerate(subjects):
        ax.barh(row, reading.eigenvalue, height=0.55, color=COLOURS[row % 2], alpha=0.8)
        values = [start.eigenvalue for start in reading.starts]
        ax.scatter(values, [row] * len(values), s=16, color="white", edgecolors=INK, linewidths=0.7, zorder=3)
        unsure = "" if all(start.converged for start in reading.starts) else ", not converged"
        text = f"{reading.eigenvalue:.4g} (spread {reading.spread:.2g}{unsure})"
        ax.text(reading.eigenvalue + 0.02 * reach, row, text, va="center", fontsize=8)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    low = min(0.0, *(reading.eigenvalue for _, reading in subjects))
    ax.set_xlim(1.1 * low, 1.55 * reach)
    ax.set_xlabel("largest eigenvalue of the Hessian over the quantized weights; a dot for every start")
    ax.set_title("Sharpest direction", loc="left")
    ax.tick_params(axis="y", length=0)
    return {"eigenvalue": figure}


def paint_trace(subjects: list[tuple[str, TraceReading]]) -> "dict[str, Figure]":
    """``trace``: of every layer's block, as it is and per weight, with standard errors."""
    names = titles([target for target, _ in subjects])
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
    figure = new_figure(9.0, 1.4 + _height(rows, len(subjects)))
    axes: Any = figure.subplots(1, 2, sharey=True)
    for k, label in ((1, "trace of the layer's Hessian block"), (2, "trace per weight")):
        ax = axes[k - 1]
        found: list[Any] = [dict(zip(panel[0], panel[k], strict=True)) for panel in panels]
        _bars(ax, rows, [{n: v for n, (v, _) in one.items()} for one in found], names)
        for index, one in enumerate(found):
            at = [_place(rows.index(n), index, len(found)) for n in one]
            ax.errorbar(
                [v for v, _ in one.values()], at, xerr=[e for _, e in one.values()],
                fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5,
            )  # fmt: skip
        ax.set_xlabel(label)
        if k == 2 and all(v > 0 for one in found for v, _ in one.values()):
            ax.set_xscale("log")
    _finish(figure, axes[0], rows, names, "Hessian trace, layer by layer (whiskers: standard error)")
    if len(names) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return {"trace": figure}


def paint_flips(subjects: list[tuple[str, FlipsReading]]) -> "dict[str, Figure]":
    """``flips``: share of the weights whose code changes; nothing where no latent weights were there."""
    measured = [
        (target, reading) for target, reading in subjects if reading.reason is None and reading.layers
    ]
    if not measured:
        return {}
    names = titles([target for target, _ in measured])
    rows = _rows([[layer.name for layer in reading.layers] for _, reading in measured])
    figure = new_figure(6.6, 1.4 + _height(rows, len(measured)))
    ax: Any = figure.subplots()
    _stripes(ax, rows)
    for index, (_, reading) in enumerate(measured):
        at = [_place(rows.index(layer.name), index, len(measured)) for layer in reading.layers]
        shares = [100 * layer.share for layer in reading.layers]
        sizes = [100 * layer.relative_size for layer in reading.layers]
        label = names[index] if len(names) > 1 else "weights that flip"
        ax.scatter(shares, at, s=26, color=COLOURS[index % 2], zorder=3, label=label, clip_on=False)
        expected = "expected: mean |e| / gap between levels" if index == len(measured) - 1 else None
        ax.scatter(sizes, at, marker="|", s=40, color=INK, linewidths=1.1, zorder=2, label=expected)
    ax.set_xscale("symlog", linthresh=LEAST_SHARE, linscale=0.4)
    ax.set_xlim(0, 100)
    ax.set_xticks([0, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
    ax.minorticks_off()
    ax.set_xlabel("weights whose code changes, in % of the layer's")
    first = measured[0][1]
    unit = "deviations" if first.rho_unit == "deviation" else "absolute"
    _finish(figure, ax, rows, names, f"flips under a perturbation of radius {first.rho:g} ({unit})")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3)
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
        label = names[index] if len(values) > 1 else None
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


def _finish(figure: "Figure", ax: Any, rows: list[str], names: list[str], title: str) -> None:
    """Names of the layers, top down, and the title."""
    ax.set_yticks(range(len(rows)), [shortened(name) for name in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle(title if len(names) > 1 else f"{names[0]}: {title}", fontsize=10)
