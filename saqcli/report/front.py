"""Plot of accuracy over cost, with labels that avoid overlaps.

Every configuration is a dot and the front a line; the budget and the float model are shown for orientation.

Each label has several candidate spots, the best first. It takes the one of least penalty: it hides no mark and no
other label, lies within the axes, crosses no line if possible, and is near. Away from its mark it gets a thin
connecting line.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saqcli.quant.cost import UNITS, Budget
from saqcli.report.canvas import ACCENT, COLORS, FAINT, INK, new_figure, save, style
from saqcli.report.pareto import Front, Point, uniform_names
from saqcli.units import counted, format_quantity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Penalties of a spot: for each conflict, and for each point of distance.
OUTSIDE, HIDES, CROSSES, FAR = 1000.0, 100.0, 3.0, 0.1
MARGIN = 1.5  # points around a text, since its size in a file differs slightly from that on the screen
NEAR = 8.0  # points from a mark, up to which no connecting line is needed
CLEAR = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.4}  # box behind text
STEPS = ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8))  # ticks per decade
FEWEST_TICKS = 5
ROOM = 0.05  # margin at every side, as a share of the range
SQUEEZED = 3.0  # the float model's line is omitted if it enlarges the range by more than this factor
Mark = tuple[float, float, float]  # x, y, radius in points
NAMES = ("BOPs for one image", "bytes of the model")


class Spot(NamedTuple):
    """A candidate position of a label.

    Attributes:
        right: points to the right of the labeled place.
        up: points above it.
        ha: horizontal alignment, as in matplotlib.
        va: vertical alignment, as in matplotlib.
        at: another place than the label's own.
    """

    right: float
    up: float
    ha: str
    va: str
    at: tuple[float, float] | None = None


def around(near: float = 5.0, rings: int = 5) -> list[Spot]:
    """Candidate spots around a mark, first at its lower right, then at increasing distance."""
    sides = ((1, -1), (1, 1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
    horizontal, vertical = {1: "left", 0: "center", -1: "right"}, {1: "bottom", 0: "center", -1: "top"}
    return [
        Spot(x * near * ring, y * near * ring, horizontal[x], vertical[y])
        for ring in range(1, rings + 1)
        for x, y in sides
    ]


class Labels:
    """The labels of one pair of axes, whose limits are final.

    Args:
        ax: with everything else drawn.
        marks: x, y and radius in points of every mark.
        lines: as sequences of (x, y).
    """

    def __init__(
        self,
        ax: Any,
        marks: Iterable[tuple[float, float, float]],
        lines: Iterable[Sequence[tuple[float, float]]],
    ) -> None:
        from matplotlib.path import Path

        self._ax = ax
        ax.figure.draw_without_rendering()  # the layout moves the axes
        self._pixels = ax.figure.dpi / 72  # in a point
        given = np.array(list(marks), dtype=float).reshape(-1, 3)
        places, sides = ax.transData.transform(given[:, :2]), given[:, 2:] * self._pixels
        self._taken = np.hstack([places - sides, places + sides])  # left, bottom, right, top of every box
        self._lines = [Path(ax.transData.transform(line)) for line in lines if len(line) > 1]

    def add(
        self,
        text: str,
        place: tuple[float, float],
        spots: Sequence[Spot],
        coords: Any = None,
        **properties: Any,
    ) -> None:
        """Write ``text`` at one of ``spots``.

        Args:
            text: one line.
            place: to label, in ``coords``.
            spots: the best first.
            coords: a transform; that of the data by default.
            properties: passed to matplotlib.
        """
        coords = self._ax.transData if coords is None else coords
        trial = self._ax.annotate(text, place, xycoords=coords, annotation_clip=False, **properties)
        size = trial.get_window_extent().size
        trial.remove()
        boxes = [self._box(spot, coords.transform(spot.at or place), size) for spot in spots]
        penalties = [self._penalty(box, spot) for box, spot in zip(boxes, spots, strict=True)]
        best = penalties.index(min(penalties))
        spot = spots[best]
        if spot.at is None and _distance(spot) > NEAR:
            properties["arrowprops"] = {
                "arrowstyle": "-",
                "linewidth": 0.5,
                "color": properties.get("color", "black"),
            }
        self._ax.annotate(
            text, spot.at or place, xycoords=coords, xytext=(spot.right, spot.up), textcoords="offset points",
            ha=spot.ha, va=spot.va, bbox=CLEAR, annotation_clip=False, **properties,
        )  # fmt: skip
        self._taken = np.vstack([self._taken, boxes[best]])

    def _box(self, spot: Spot, place: Any, size: Any) -> Any:
        """Left, bottom, right and top of a text of ``size`` at ``spot``, with a margin; all in pixels."""
        x, y = place + self._pixels * np.array([spot.right, spot.up])
        left = x - size[0] * {"left": 0.0, "center": 0.5, "right": 1.0}[spot.ha]
        bottom = y - size[1] * {"bottom": 0.0, "center": 0.5, "top": 1.0}[spot.va]
        margin = MARGIN * self._pixels
        return np.array([left - margin, bottom - margin, left + size[0] + margin, bottom + size[1] + margin])

    def _penalty(self, box: Any, spot: Spot) -> float:
        from matplotlib.transforms import Bbox

        room = self._ax.bbox.padded(MARGIN * self._pixels).extents
        outside = (box[:2] < room[:2]).any() or (box[2:] > room[2:]).any()
        hidden = ((self._taken[:, :2] < box[2:]) & (self._taken[:, 2:] > box[:2])).all(1).sum()
        crossed = sum(line.intersects_bbox(Bbox.from_extents(*box), filled=False) for line in self._lines)
        return float(OUTSIDE * outside + HIDES * hidden + CROSSES * crossed + FAR * _distance(spot))


def _distance(spot: Spot) -> float:
    """Points from the labeled place."""
    return max(abs(spot.right), abs(spot.up))


def draw_front(front: Front, path: Path) -> list[Path]:
    """Draw the front to files.

    Args:
        front: of a search.
        path: of the files, without a suffix.

    Returns:
        Paths of the PNG and the SVG.
    """
    with style():
        return save(paint_front(front), path)


def paint_front(front: Front) -> "Figure":
    """Top-1 over BOPs, or over bytes if the budget limits bytes only."""
    unit = 1 if front.budget_bops is None and front.budget_bytes is not None else 0
    figure = new_figure(7.2, 4.6)
    ax: Any = figure.subplots()
    ax.set_xscale("log")
    marks = [*_dominated(ax, front, unit), *_uniform(ax, front, unit), *_chosen(ax, front, unit)]
    line, best = _best(ax, front, unit)
    ax.set_xlabel(NAMES[unit])
    ax.set_ylabel(f"top-1 in %, calibrated, on {counted(front.images, 'held-out image')}")
    ax.grid(color=FAINT, linewidth=0.4, alpha=0.6)
    ax.set_axisbelow(True)
    ax.set_title(f"{front.model}: accuracy over cost, searcher {front.searcher}", loc="left")
    figure.legend(handles=_legend(ax), loc="outside lower center", ncols=4, columnspacing=1.4)
    _limit_costs(ax, front, unit)
    in_view = _limit_accuracies(ax, front)
    lines, bound = [line], (front.budget_bops, front.budget_bytes)[unit]
    if bound is not None:  # the policy never lies to the right of it
        ax.axvline(bound, color=INK, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1)
        lines.append([(bound, y) for y in ax.get_ylim()])
    if in_view:
        ax.axhline(front.float_top1, color=INK, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
        lines.append([(x, front.float_top1 or 0.0) for x in ax.get_xlim()])
    labels = Labels(ax, [*marks, *best], lines)
    _name_lines(ax, labels, front, unit, in_view=in_view)
    for index, name in uniform_names(front).items():
        place = _place(front.points[index], unit)
        labels.add(name, place, around(), fontsize=7.5, color=COLORS[1], zorder=9)
    return figure


def _place(point: Point, unit: int) -> tuple[float, float]:
    return point.cost[unit], point.top1


def _scatter(ax: Any, points: Sequence[Point], unit: int, area: float, **properties: Any) -> list[Mark]:
    """Draw square points; returns their positions and radii."""
    if points:
        ax.scatter(*zip(*(_place(point, unit) for point in points), strict=True), s=area, **properties)
    return [(*_place(point, unit), math.sqrt(area) / 2) for point in points]


def _dominated(ax: Any, front: Front, unit: int) -> list[Mark]:
    """Dominated configurations without a label."""
    named = uniform_names(front)
    rest = [
        point
        for index, point in enumerate(front.points)
        if not point.on_front and point.kind != "chosen" and index not in named
    ]
    properties = {"color": "#9A9A9A", "alpha": 0.55, "linewidths": 0, "zorder": 4}
    return _scatter(ax, rest, unit, 9, label="other configurations", **properties)


def _uniform(ax: Any, front: Front, unit: int) -> list[Mark]:
    """Configurations of uniform bits."""
    found = [front.points[index] for index in uniform_names(front)]
    properties = {"facecolors": "white", "edgecolors": COLORS[1], "linewidths": 1.2, "zorder": 5}
    return _scatter(ax, found, unit, 36, marker="s", label="uniform bits", **properties)


def _chosen(ax: Any, front: Front, unit: int) -> list[Mark]:
    """The policy."""
    found = [point for point in front.points if point.kind == "chosen"]
    text = "".join(
        f"chosen: {point.top1:.2f} % at {format_quantity(point.cost[unit], UNITS[unit])}" for point in found
    )
    properties = {"color": ACCENT, "edgecolors": INK, "linewidths": 0.8, "zorder": 6}
    return _scatter(ax, found, unit, 130, marker="*", label=text, **properties)


def _best(ax: Any, front: Front, unit: int) -> tuple[list[tuple[float, float]], list[Mark]]:
    """The front, above all other marks; with two budgets the line joins the points that are optimal in this unit."""
    best = [point for point in front.points if point.on_front]
    best.sort(key=lambda point: (point.cost[unit], -point.top1, point.loss))
    joined: list[Point] = []
    for point in best:
        if not joined or (point.top1, -point.loss) >= (joined[-1].top1, -joined[-1].loss):
            joined.append(point)
    line = [_place(point, unit) for point in joined]
    both = front.budget_bops is not None and front.budget_bytes is not None
    if len(line) > 1:
        ax.plot(*zip(*line, strict=True), color=COLORS[0], linewidth=1.4, zorder=3)
    properties = {"color": COLORS[0], "edgecolors": "white", "linewidths": 0.5, "zorder": 8}
    label = "front (off the line: in bytes)" if both else "front"
    return line, _scatter(ax, best, unit, 16, label=label, **properties)


def _legend(ax: Any) -> list[Any]:
    """Legend handles; the front first, with its line."""
    from matplotlib.lines import Line2D

    handles, labels = ax.get_legend_handles_labels()
    width = 1.4 * bool(ax.get_lines())
    front = [label for label in labels if label.startswith("front")]
    return [
        *(
            Line2D([], [], color=COLORS[0], linewidth=width, marker="o", markersize=4, label=label)
            for label in front
        ),
        *(handle for handle, label in zip(handles, labels, strict=True) if label not in front),
    ]


def _limit_accuracies(ax: Any, front: Front) -> bool:
    """Limit the axis to 0..100; returns whether the float model's line is in view.

    The line is omitted if it would squeeze the rest.
    """
    low, high = ax.get_ylim()
    room = ROOM * (high - low)
    low, high = max(low, -room), min(high, 100 + room)
    ax.set_ylim(low, high)
    if front.float_top1 is None:
        return False
    wanted = max(high, front.float_top1 + room)
    if wanted - low > SQUEEZED * (high - low):
        return False
    ax.set_ylim(min(low, front.float_top1 - room), wanted)
    return True


def _name_lines(ax: Any, labels: Labels, front: Front, unit: int, *, in_view: bool) -> None:
    """Label the budget along its line, and the float model along its own, or at the top if that is out of view."""
    small = {"fontsize": 7.5, "zorder": 9}
    bound = (front.budget_bops, front.budget_bytes)[unit]
    if bound is not None:
        heights = (0.015, 0.9, 0.1, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5)
        spots = [
            Spot(right, 0, side, "bottom", (bound, height))
            for height in heights
            for right, side in ((4, "left"), (-4, "right"))
        ]
        text = f"budget {Budget(front.budget_bops, front.budget_bytes)}"
        labels.add(text, (bound, 0), spots, ax.get_xaxis_transform(), **small)
    if front.float_top1 is not None:
        height, where = (front.float_top1, "") if in_view else (ax.get_ylim()[1], ", above the plot")
        ways = ((2, "bottom"), (-2, "top")) if in_view else ((-2, "top"),)
        spots = [
            Spot(0, up, side, va, (way, height))
            for way, side in ((0.012, "left"), (0.99, "right"), (0.25, "left"), (0.5, "left"))
            for up, va in ways
        ]
        text = f"float {front.float_top1:.2f} %{where}"
        labels.add(text, (0.012, height), spots, ax.get_yaxis_transform(), **small)


def _limit_costs(ax: Any, front: Front, unit: int) -> None:
    """Set a margin at both sides, and ticks with units."""
    costs = [point.cost[unit] for point in front.points]
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
    """Round costs between two logarithms, as many as needed."""
    from matplotlib.ticker import MaxNLocator

    for steps in STEPS:
        every = [step * 10**k for k in range(math.floor(low), math.ceil(high) + 1) for step in steps]
        ticks = [tick for tick in every if low <= math.log10(tick) <= high]
        if len(ticks) >= FEWEST_TICKS:
            return ticks
    even = MaxNLocator(FEWEST_TICKS).tick_values(10**low, 10**high)
    return [float(tick) for tick in even if 10**low <= tick <= 10**high]
