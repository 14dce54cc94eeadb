"""Accuracy over cost: every configuration a dot, the front a line, the budget and the float model for orientation."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saqcli.quant.cost import UNITS, Budget
from saqcli.units import counted, format_quantity
from saqcli.workflows.pictures.canvas import ACCENT, COLOURS, FAINT, INK, new_figure, save, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saqcli.workflows.pareto import Front, Point

STEPS = (
    (1,),
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 6, 8),
    tuple(1 + k / 10 for k in range(90)),
)  # ticks of a decade
FEWEST_TICKS = 5
ROOM = 0.05  # of the range, left free at every side
MIDDLE = 0.6  # of the axis, beyond which the name of a line is written on its left
NAMES = ("BOPs for one image", "bytes of the model")


def draw_front(front: "Front", path: Path) -> list[Path]:
    """Draw the front.

    Args:
        front: of a search.
        path: of the files, without a suffix.

    Returns:
        Paths of the PNG and the SVG.
    """
    with style():
        return save(paint_front(front), path)


def paint_front(front: "Front") -> "Figure":
    """Top-1 over BOPs, or over bytes where the budget is in bytes alone."""
    unit = 1 if front.budget_bops is None and front.budget_bytes is not None else 0
    figure = new_figure(7.2, 4.6)
    ax: Any = figure.subplots()
    ax.set_xscale("log")
    _dots(ax, front, unit)
    _line(ax, front, unit)
    _uniform(ax, front, unit)
    _chosen(ax, front, unit)
    _limits(ax, front, unit)
    _budget(ax, Budget(front.budget_bops, front.budget_bytes), unit)
    if front.float_top1 is not None:
        ax.axhline(front.float_top1, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        _note(ax, 0.012, front.float_top1, f"float {front.float_top1:.2f} %", ax.get_yaxis_transform())
    ax.set_xlabel(NAMES[unit])
    ax.set_ylabel(f"top-1 in %, on the {counted(front.images, 'image')} of the search")
    ax.grid(color=FAINT, linewidth=0.4, alpha=0.6)
    ax.set_axisbelow(True)
    ax.set_title(f"{front.model}: accuracy over cost, searcher {front.searcher}", loc="left")
    figure.legend(loc="outside lower center", ncols=4, columnspacing=1.4)
    return figure


def _cost(point: "Point", unit: int) -> int:
    return point.cost[unit]


def _dots(ax: Any, front: "Front", unit: int) -> None:
    """All that is beaten, and is no landmark."""
    rest = [point for point in front.points if not point.on_front]
    if rest:
        places = [[_cost(point, unit) for point in rest], [point.top1 for point in rest]]
        ax.scatter(
            *places, s=9, color="#9A9A9A", alpha=0.55, linewidths=0, zorder=2, label="other configurations"
        )


def _line(ax: Any, front: "Front", unit: int) -> None:
    """The front; with two budgets only those of its points are joined that nothing beats in this unit."""
    best = [point for point in front.points if point.on_front]
    best.sort(key=lambda point: (_cost(point, unit), -point.top1, point.loss))
    joined: list[Point] = []
    for point in best:
        if not joined or (point.top1, -point.loss) >= (joined[-1].top1, -joined[-1].loss):
            joined.append(point)
    both = front.budget_bops is not None and front.budget_bytes is not None
    label = "front (off the line: in bytes)" if both else "front"
    ax.plot(
        [_cost(p, unit) for p in joined], [p.top1 for p in joined], color=COLOURS[0], linewidth=1.4, zorder=3
    )
    ax.scatter(
        [_cost(p, unit) for p in best], [p.top1 for p in best], s=22, color=COLOURS[0], edgecolors="white",
        linewidths=0.5, zorder=4, label=label,
    )  # fmt: skip


def _uniform(ax: Any, front: "Front", unit: int) -> None:
    """The same bits everywhere, with their names."""
    named = uniform_names(front)
    if not named:
        return
    found = [(front.points[index], name) for index, name in named.items()]
    places = [[_cost(point, unit) for point, _ in found], [point.top1 for point, _ in found]]
    ax.scatter(
        *places, s=30, marker="s", facecolors="white", edgecolors=COLOURS[1], linewidths=1.2, zorder=5,
        label="uniform bits",
    )  # fmt: skip
    for point, name in found:
        ax.annotate(
            name, (_cost(point, unit), point.top1), xytext=(6, -3), textcoords="offset points", fontsize=7.5,
            color=COLOURS[1], va="top", zorder=7, bbox=_CLEAR,
        )  # fmt: skip


def uniform_names(front: "Front") -> dict[int, str]:
    """``w4a4`` and the like by index of the point: what all layers have whose bits are not the same in all points."""
    layers = [name for name in front.macs if len({point.layers[name] for point in front.points}) > 1]
    names = {}
    for index, point in enumerate(front.points):
        bits = Counter(str(point.layers[name]) for name in layers)
        if bits and (point.kind == "uniform" or len(bits) == 1):
            names[index] = bits.most_common(1)[0][0]
    return names


def _chosen(ax: Any, front: "Front", unit: int) -> None:
    for point in front.points:
        if point.kind == "chosen":
            text = f"chosen: {point.top1:.2f} % at {format_quantity(_cost(point, unit), UNITS[unit])}"
            ax.scatter(
                _cost(point, unit), point.top1, s=130, marker="*", color=ACCENT, edgecolors=INK, linewidths=0.8,
                zorder=6, label=text,
            )  # fmt: skip


def _limits(ax: Any, front: "Front", unit: int) -> None:
    """Room at all sides, and ticks with units."""
    costs = [_cost(point, unit) for point in front.points]
    budget = (front.budget_bops, front.budget_bytes)[unit]
    costs += [budget] if budget is not None else []
    low, high = math.log10(max(min(costs, default=1), 1)), math.log10(max(*costs, 1, 1))
    room = ROOM * (high - low) or 0.1
    low, high = low - room, high + room
    ticks = _ticks(low, high)
    ax.set_xlim(10**low, 10**high)
    ax.set_xticks(ticks, [format_quantity(tick, UNITS[1] if unit else "") for tick in ticks])
    ax.minorticks_off()


def _ticks(low: float, high: float) -> list[float]:
    """Round costs between two logarithms, as many as are needed."""
    ticks: list[float] = []
    for steps in STEPS:
        every = [step * 10**k for k in range(math.floor(low), math.ceil(high) + 1) for step in steps]
        ticks = [tick for tick in every if low <= math.log10(tick) <= high]
        if len(ticks) >= FEWEST_TICKS:
            break
    return ticks


def _budget(ax: Any, budget: Budget, unit: int) -> None:
    """A line that nothing chosen lies to the right of; a bound in the other unit is named only."""
    bound = dict(budget.bounds()).get(unit)
    if bound is None:
        return
    ax.axvline(bound, color=INK, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)
    low, high = ax.get_xlim()
    left = math.log(bound / low) > MIDDLE * math.log(high / low)  # the side on which there is room
    ax.annotate(
        f"budget {budget}", (bound, 0.015), xycoords=ax.get_xaxis_transform(), xytext=(-4 if left else 4, 0),
        textcoords="offset points", fontsize=7.5, ha="right" if left else "left", va="bottom", bbox=_CLEAR,
    )  # fmt: skip


def _note(ax: Any, x: float, y: float, text: str, transform: Any) -> None:
    ax.annotate(text, (x, y), xycoords=transform, xytext=(0, 2), textcoords="offset points", fontsize=7.5)


_CLEAR = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.4}  # behind text
