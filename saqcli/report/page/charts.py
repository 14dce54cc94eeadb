"""The pictures of a page: bits of layers, curves of training, blocks, the front, the landscape, runs side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from saqcli.analysis.landscape import LandscapeReading
from saqcli.quant.bits import MAX_BITS, LayerBits, mean_bits
from saqcli.report.canvas import shortened
from saqcli.report.page.contents import BlockRow, Metric
from saqcli.report.page.svg import Axes, Labels, Picture, Point, Scale, number, spread
from saqcli.report.pareto import Front, uniform_names
from saqcli.units import format_quantity

Array = NDArray[np.float64]
Offsets = NDArray[np.uint32]
WIDTH, HEIGHT = 460.0, 300.0  # of a plot
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 26.0, 44.0  # margins of a plot
FLOAT_HEIGHT = MAX_BITS + 1  # of a bar in floating point
FAINTEST = 0.22  # opacity of a layer without bit-operations
CONTOURS, FINE = 11, 61  # levels of the landscape, and points along each side
NAME, LONGEST = 5.9, 24  # pixels a letter of the name of a layer; most letters


@dataclass(frozen=True)
class LayerBar:
    """A layer in the picture of a policy; ``share`` of the bit-operations is None where that is unknown."""

    name: str
    bits: LayerBits
    share: float | None
    macs: int
    pinned: bool


def policy_picture(layers: Sequence[LayerBar]) -> Markup:
    """Bars of weight bits upwards and of input bits downwards, a column a layer, darker by share of BOPs."""
    count = len(layers)
    column = 38.0 if count <= 22 else max(14.0, 850.0 / count)
    unit, left, middle = 13.0, 46.0, 13.0 * (FLOAT_HEIGHT + 1.2)
    names = [shortened(layer.name, LONGEST) for layer in layers]
    height = 2 * middle + 14 + NAME * max(map(len, names))
    picture = Picture(left + column * count + 8, height, "Bits of every layer", "policy", scrolls=True)
    most = max((layer.share or 0.0 for layer in layers), default=0.0) or 1.0
    for bits in (2, 4, 6, 8):
        for sign in (1, -1):
            y = middle - sign * bits * unit
            picture.line([(left, y), (left + column * count, y)], "grid")
            picture.text((left - 8, y + 4), str(bits), "tick", "end")
    picture.text((11, middle - 4.5 * unit), "weights", "name", "middle", -90)
    picture.text((11, middle + 4.5 * unit), "inputs", "name", "middle", -90)
    wide = min(column - 4, 24.0)
    for index, layer in enumerate(layers):
        x = left + column * index + (column - wide) / 2
        share = "" if layer.share is None else f", {100 * layer.share:.1f} % of the bit-operations"
        note = f"{layer.name}: {layer.bits}{share}{', pinned' if layer.pinned else ''}"
        opacity = FAINTEST + (1 - FAINTEST) * (layer.share or 0.0) / most if layer.share is not None else 0.7
        for sign, width in ((1, layer.bits.weight), (-1, layer.bits.activation)):
            size = unit * (width or FLOAT_HEIGHT)
            kind = ("bar" if width else "bar float") + (" pinned" if layer.pinned else "")
            top = middle - size if sign > 0 else middle
            picture.box(x, top, wide, size, kind, note, opacity=opacity if width else None, round_by=2)
            if column >= 14:
                y = top - 4 if sign > 0 else middle + size + 12
                picture.text((x + wide / 2, y), str(width or "f"), "digit", "middle")
        picture.text((x + wide / 2 + 4, 2 * middle + 10), names[index], "layer", "end", -90)
    macs = {layer.name: layer.macs for layer in layers}
    if sum(macs.values()):
        for sign, mean in zip((1, -1), mean_bits({e.name: e.bits for e in layers}, macs), strict=True):
            if mean <= FLOAT_HEIGHT:
                y = middle - sign * mean * unit
                picture.line([(left, y), (left + column * count, y)], "mean")
    picture.line([(left, middle), (left + column * count, middle)], "axis")
    return picture.markup()


def curves(
    metrics: Sequence[Metric], *, figure: str, start: float | None, floating: float | None
) -> Markup | None:
    """A figure of every epoch, on training and on validation images; None without epochs.

    Args:
        metrics: lines of the log.
        figure: ``top1`` in percent or ``loss``.
        start: on validation images before the first epoch.
        floating: of the float network on validation images.
    """

    def of(phase: str) -> list[Point]:
        rows = [(line.epoch, getattr(line, figure)) for line in metrics if line.phase == phase]
        return [(epoch, value) for epoch, value in rows if epoch is not None and value is not None]

    training, validation = of("train"), of("val")
    if not validation:
        return None
    validation = [(0.0, start), *validation] if start is not None else validation
    known = [value for _, value in (*training, *validation)] + ([floating] if floating is not None else [])
    epochs = max(epoch for epoch, _ in validation)
    title = "Top-1 by epoch" if figure == "top1" else "Loss by epoch"
    picture = Picture(WIDTH, HEIGHT, title)
    x = Scale(0, max(epochs, 1), LEFT, WIDTH - RIGHT)
    y = spread(known, HEIGHT - BOTTOM, TOP)
    if figure == "top1" and y.high > 100:
        y = Scale(y.low, 100, y.start, y.end)
    axes = Axes(picture, x, y)
    step = max(1, math.ceil(epochs / 8))
    y_label = "top-1, %" if figure == "top1" else "loss"
    axes.draw("epoch", y_label, "{:g}".format, "{:g}".format, [*range(0, int(epochs) + 1, step)])
    if floating is not None:
        picture.line([axes.at(x.low, floating), axes.at(x.high, floating)], "reference")
    for points, kind in ((training, "second"), (validation, "first")):
        picture.line([axes.at(*point) for point in points], f"curve {kind}")
        for epoch, value in points:
            picture.dot(axes.at(epoch, value), 3, f"dot {kind}", f"epoch {epoch:g}: {value:.4g}")
    return picture.markup()


def blocks_picture(blocks: Sequence[BlockRow]) -> Markup:
    """The error of every block before reconstruction, and after it."""
    names = [shortened(block.name, LONGEST) for block in blocks]
    column = 36.0 if len(blocks) <= 20 else max(12.0, 720.0 / len(blocks))
    bottom, left = 22 + NAME * max(map(len, names)), 58.0
    width = max(left + column * len(blocks) + 8, 220.0)
    title = "Error of every block before and after reconstruction"
    picture = Picture(width, 190 + bottom, title, "blocks", scrolls=True)
    most = max(max(block.before, block.after) for block in blocks) or 1.0
    y = Scale(0, 1.05 * most, 190, 24)
    for tick in y.ticks(4):
        picture.line([(left, y(tick)), (left + column * len(blocks), y(tick))], "grid")
        picture.text((left - 8, y(tick) + 4), f"{100 * tick:g}", "tick", "end")
    picture.text((0, 12), "error, % of the variance of the output", "name")
    wide = min(column - 4, 20.0)
    for index, block in enumerate(blocks):
        x = left + column * index + (column - wide) / 2
        note = f"{block.name}: {100 * block.before:.3g} % before, {100 * block.after:.3g} % after"
        picture.box(x, y(block.before), wide, y(0) - y(block.before), "bar before", note, round_by=2)
        picture.box(x, y(block.after), wide, y(0) - y(block.after), "bar", note, round_by=2)
        picture.text((x + wide / 2 + 4, 200), names[index], "layer", "end", -90)
    picture.line([(left, y(0)), (left + column * len(blocks), y(0))], "axis")
    return picture.markup()


def front_picture(front: Front) -> Markup:
    """Accuracy over cost of every configuration that a search scored, with its front, its choice and uniform bits."""
    unit = 1 if front.budget_bops is None and front.budget_bytes is not None else 0
    bound = (front.budget_bops, front.budget_bytes)[unit]
    costs = [point.cost[unit] for point in front.points] + ([bound] if bound is not None else [])
    accuracies = [point.top1 for point in front.points]
    low, high = min(accuracies), max(accuracies)
    shows_float = front.float_top1 is not None and front.float_top1 - low <= 2 * max(high - low, 1.0)
    picture = Picture(WIDTH, HEIGHT + 30, "Accuracy over cost of the configurations that were tried")
    x = spread(costs, LEFT, WIDTH - RIGHT, log=True)
    y = spread(accuracies + ([front.float_top1 or 0.0] if shows_float else []), HEIGHT + 30 - BOTTOM, TOP)
    axes = Axes(picture, x, y)
    suffix = ("", "B")[unit]
    axes.draw(
        ("bit-operations", "bytes")[unit], "top-1, %", lambda v: format_quantity(v, suffix), "{:g}".format
    )
    if shows_float:
        picture.line(
            [axes.at(x.low, front.float_top1 or 0), axes.at(x.high, front.float_top1 or 0)], "reference"
        )
    if bound is not None:
        picture.line([(x(bound), y.start), (x(bound), y.end)], "budget")
    best = sorted((p for p in front.points if p.on_front), key=lambda p: (p.cost[unit], -p.top1))
    joined = [best[0]] if best else []
    for point in best[1:]:
        if point.top1 >= joined[-1].top1:
            joined.append(point)
    picture.line([axes.at(p.cost[unit], p.top1) for p in joined], "curve first")
    uniform = uniform_names(front)
    spots = []
    for index, point in enumerate(front.points):
        at = axes.at(point.cost[unit], point.top1)
        spots.append((at[0] - 5, at[1] - 5, at[0] + 5, at[1] + 5))
        note = f"{uniform.get(index, point.kind)}: {point.top1:.2f} % at {format_quantity(point.cost[unit], suffix)}"
        if point.kind == "chosen":
            picture.dot(at, 8, "chosen", note)
        elif index in uniform:
            picture.box(at[0] - 4, at[1] - 4, 8, 8, "uniform", note)
        else:
            picture.dot(
                at, 3.2 if point.on_front else 2.4, "dot first" if point.on_front else "dot other", note
            )
    labels = Labels(picture, spots)
    for index, point in enumerate(front.points):
        at = axes.at(point.cost[unit], point.top1)
        if point.kind == "chosen":
            labels.put(at, f"chosen, {point.top1:.2f} %", "label strong", 12)
        elif index in uniform:
            labels.put(at, uniform[index], "label")
    return picture.markup()


def landscape_picture(reading: LandscapeReading, beside: Sequence[LandscapeReading] = ()) -> Markup | None:
    """The loss over a plane through the weights, as filled contours of its logarithm; None if it is flat or unknown.

    Args:
        reading: the losses.
        beside: further ones, on the same scale.
    """
    from contourpy import contour_generator

    losses, *others = (_losses(each) for each in (reading, *beside))
    known = losses[np.isfinite(losses)]
    if not len(known) or known.min() == known.max():
        return None
    scale = np.concatenate([known, *(each[np.isfinite(each)] for each in others)])
    least = max(float(scale.max()) * 1e-6, 1e-12)
    low, high = (math.log(max(float(value), least)) for value in (scale.min(), scale.max()))
    height = np.log(np.maximum(losses, least))
    height = np.where(np.isfinite(height), height, np.nanmax(height))
    side, margin = 300.0, 12.0
    picture = Picture(
        side + 2 * margin, side + 2 * margin, "The loss around the quantized weights", "landscape"
    )
    height = _refined(height)
    across = np.linspace(margin, margin + side, len(height))
    contours = contour_generator(across, across[::-1], height, fill_type="OuterOffset")
    levels = [low + (high - low) * (k + 0.5) / CONTOURS for k in range(CONTOURS)]
    picture.box(margin, margin, side, side, "sea", round_by=4)
    for level in reversed(levels):
        shapes, rings = cast("tuple[list[Array], list[Offsets]]", contours.filled(low - 1, level))
        picture.path("".join(map(_polygon, shapes, rings)), "depth")
    middle = margin + side / 2
    picture.dot((middle, middle), 4.5, "chosen", f"the quantized weights: loss {_middle(reading):.4g}")
    return picture.markup()


def _losses(reading: LandscapeReading) -> Array:
    """The losses, NaN where they are unknown."""
    return np.array([[math.nan if v is None else v for v in row] for row in reading.loss], np.float64)


def _middle(reading: LandscapeReading) -> float:
    return reading.loss[reading.grid // 2][reading.grid // 2] or 0.0


def _refined(height: Array) -> Array:
    """The same surface on a finer grid, interpolated by cubic splines, within the range of its values."""
    from scipy.interpolate import RectBivariateSpline

    points, fine = np.arange(len(height)), np.linspace(0, len(height) - 1, max(FINE, len(height)))
    degree = min(3, len(height) - 1)
    surface = RectBivariateSpline(points, points, height, kx=degree, ky=degree)(fine, fine)
    found: Array = np.clip(surface, height.min(), height.max())
    return found


def _polygon(points: Array, rings: Offsets) -> str:
    """SVG path of a polygon with holes; ``rings`` are the first points of its rings, and the end of the last."""
    parts = [points[first:last] for first, last in pairwise(rings.tolist())]
    return "".join("M" + "L".join(f"{number(x)} {number(y)}" for x, y in part[:-1]) + "Z" for part in parts)


def histogram(shares: Sequence[float], title: str) -> Markup:
    """A small picture of a distribution, for a cell of a table."""
    bars = [sum(shares[k : k + 3]) for k in range(0, len(shares), 3)]
    picture = Picture(96, 22, title, "spark")
    most = max(bars, default=0.0) or 1.0
    step = 96 / max(len(bars), 1)
    points: list[Point] = [(0, 21)]
    for index, share in enumerate(bars):
        y = 21 - 19 * (share / most) ** 0.5
        points += [(index * step, y), ((index + 1) * step, y)]
    picture.line([*points, (96, 21)], "area")
    return picture.markup()


@dataclass(frozen=True)
class RunPoint:
    """A run in the comparison; ``accuracy`` in percent."""

    name: str
    bops: int
    accuracy: float


def runs_picture(runs: Sequence[RunPoint], floats: Sequence[tuple[str, float]], y_label: str) -> Markup:
    """Accuracy over bit-operations of several runs, with the float networks as lines."""
    picture = Picture(WIDTH, HEIGHT + 30, "Accuracy over bit-operations of the runs")
    x = spread([run.bops for run in runs], LEFT, WIDTH - RIGHT, log=True, room=0.16)
    known = [run.accuracy for run in runs]
    low, high = min(known), max(known)
    near = [(name, top) for name, top in floats if top - low <= 3 * max(high - low, 1.0)]
    y = spread(known + [top for _, top in near], HEIGHT + 30 - BOTTOM, TOP, room=0.12)
    axes = Axes(picture, x, y)
    axes.draw("bit-operations", y_label, format_quantity, "{:g}".format)
    for _, top in near:
        picture.line([axes.at(x.low, top), axes.at(x.high, top)], "reference")
    spots = [
        (*(v - 7 for v in axes.at(run.bops, run.accuracy)), *(v + 7 for v in axes.at(run.bops, run.accuracy)))
        for run in runs
    ]
    labels = Labels(picture, [(a, b, c, d) for a, b, c, d in spots])
    for run in runs:
        at = axes.at(run.bops, run.accuracy)
        picture.dot(at, 6, "dot first", f"{run.name}: {run.accuracy:.2f} % at {format_quantity(run.bops)}")
        labels.put(at, shortened(run.name, LONGEST), "label", 11)
    for name, top in near:
        labels.put(((x.start + x.end) / 2, y(top)), name, "label", 4)
    return picture.markup()


def matrix_picture(
    names: Sequence[str], layers: Sequence[str], bits: Sequence[Sequence[LayerBits]]
) -> Markup:
    """The bits of every layer in several runs of one network: a row a run, a column a layer, stronger by bits."""
    column = 34.0 if len(layers) <= 28 else max(15.0, 950.0 / len(layers))
    row = 26.0
    rows = [shortened(name, LONGEST) for name in names]
    columns = [shortened(name, LONGEST) for name in layers]
    left = 16 + 7.2 * max(map(len, rows))
    bottom = 12 + NAME * max(map(len, columns))
    size = left + column * len(layers) + 4, row * len(rows) + bottom
    picture = Picture(*size, "Bits of every layer in every run", "matrix", scrolls=True)
    for place, (name, of_run) in enumerate(zip(rows, bits, strict=True)):
        y = row * place
        picture.text((left - 10, y + 17), name, "label", "end")
        for index, one in enumerate(of_run):
            strength = (
                math.sqrt((one.weight or FLOAT_HEIGHT) * (one.activation or FLOAT_HEIGHT)) / FLOAT_HEIGHT
            )
            note = f"{names[place]}, {layers[index]}: {one}"
            x = left + column * index
            opacity = 0.06 + 0.6 * max(strength - 0.2, 0)
            picture.box(x + 1, y + 1, column - 2, row - 2, "bar", note, opacity=opacity, round_by=3)
            weight, activation = (str(width or "f") for width in (one.weight, one.activation))
            text = weight if weight == activation else f"{weight}/{activation}"
            if column >= 7 * len(text) + 4:
                picture.text((x + column / 2, y + 17), text, "digit", "middle")
    for index, name in enumerate(columns):
        picture.text((left + column * (index + 0.5) + 4, row * len(rows) + 8), name, "layer", "end", -90)
    return picture.markup()
