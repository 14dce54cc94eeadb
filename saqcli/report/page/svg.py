"""Inline SVG: elements, scales and axes. Colors and fonts come from the style sheet of the page, by class.

Text stays text, and no element has an id, so that many pictures fit on one page. Coordinates are pixels of a picture
that the browser scales to the width of its column.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Point = tuple[float, float]
STEPS = (1.0, 2.0, 5.0)
LETTER = 6.6  # pixels, mean width at the size of labels


def number(value: float) -> str:
    """A coordinate with one decimal place at most."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Scale:
    """Maps values to pixels.

    Attributes:
        low: value at ``start``.
        high: value at ``end``, above ``low``.
        start: pixel.
        end: pixel.
        log: whether distances are ratios; then values are above 0.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of ``value``, or one just beyond the end if it is outside."""
        low, high = self._linear(self.low), self._linear(self.high)
        share = (self._linear(value) - low) / ((high - low) or 1.0)
        return self.start + min(max(share, -0.02), 1.02) * (self.end - self.start)

    def _linear(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self, most: int = 5) -> list[float]:
        """Round values within the scale, ``most`` at most if there are so few."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1.0,), (1.0, 3.0), STEPS, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
                found = [step * 10.0**k for k in range(first, last + 1) for step in steps]
                found = [tick for tick in found if self.low <= tick <= self.high]
                if len(found) >= 3:
                    return found[:: math.ceil(len(found) / (most + 1))]
        span = (self.high - self.low) or 1.0
        unit = 10.0 ** math.floor(math.log10(span / most))
        step = next(s * unit for s in (*STEPS, 10.0) if span / (s * unit) <= most)
        return [
            k * step
            for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)
        ]


def spread(
    values: Iterable[float], start: float, end: float, *, log: bool = False, room: float = 0.06
) -> Scale:
    """A scale that holds all values, with some room at both ends.

    Args:
        values: finite, at least one.
        start: pixel of the least.
        end: pixel of the greatest.
        log: as in ``Scale``; values below 1 count as 1.
        room: at each end, as a share of the range.
    """
    found = [max(value, 1.0) for value in values] if log else list(values)
    low, high = min(found), max(found)
    if log:
        a, b = math.log10(low), math.log10(high)
        extra = room * (b - a) or 0.1
        return Scale(10 ** (a - extra), 10 ** (b + extra), start, end, log=True)
    extra = room * (high - low) or max(abs(high) * 0.05, 0.5)
    return Scale(low - extra, high + extra, start, end)


class Picture:
    """An SVG under construction.

    Args:
        width: in pixels.
        height: in pixels.
        title: what it shows, read by screen readers.
        kind: further classes of the element.
        scrolls: whether a narrow page scrolls the picture in the place of making it small.
    """

    def __init__(
        self, width: float, height: float, title: str, kind: str = "", *, scrolls: bool = False
    ) -> None:
        self.width, self.height, self._scrolls = width, height, scrolls
        self._parts: list[str] = []
        self._title, self._kind = title, kind

    def line(self, points: Sequence[Point], kind: str) -> None:
        """Joined points."""
        if points:
            path = "L".join(f"{number(x)} {number(y)}" for x, y in points)
            self._parts.append(f'<path class="{kind}" d="M{path}"/>')

    def path(self, data: str, kind: str, style: str = "") -> None:
        """A path of the caller's own."""
        self._parts.append(f'<path class="{kind}"{f" style={style!r}" if style else ""} d="{data}"/>')

    def dot(self, at: Point, radius: float, kind: str, note: str = "") -> None:
        """A circle; ``note`` appears under the pointer."""
        x, y = at
        self._element(f'circle class="{kind}" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"', note)

    def box(
        self, x: float, y: float, width: float, height: float, kind: str, note: str = "", *,
        opacity: float | None = None, round_by: float = 0,
    ) -> None:  # fmt: skip
        """A rectangle; ``note`` appears under the pointer."""
        more = f' fill-opacity="{opacity:.2f}"' if opacity is not None else ""
        more += f' rx="{number(round_by)}"' if round_by else ""
        place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
        self._element(f'rect class="{kind}" {place}{more}', note)

    def text(self, at: Point, text: str, kind: str = "label", anchor: str = "start", turn: float = 0) -> None:
        """A line of text at its baseline, turned by degrees."""
        x, y = at
        place = f'x="{number(x)}" y="{number(y)}"'
        if turn:
            place = f'transform="translate({number(x)} {number(y)}) rotate({number(turn)})"'
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._parts.append(f'<text class="{kind}" {place}{where}>{escape(text)}</text>')

    def _element(self, head: str, note: str) -> None:
        name = head.partition(" ")[0]
        self._parts.append(f"<{head}><title>{escape(note)}</title></{name}>" if note else f"<{head}/>")

    def markup(self) -> Markup:
        """The element."""
        least = (
            f' style="min-width:{0.9 * self.width:.0f}px;max-width:{1.3 * self.width:.0f}px"'
            if self._scrolls
            else ""
        )
        size = f"{number(self.width)} {number(self.height)}"
        head = f'<svg class="picture {self._kind}"{least} viewBox="0 0 {size}" role="img"'
        body = "".join(self._parts)
        return Markup(f'{head} aria-label="{escape(self._title)}">{body}</svg>')


@dataclass(frozen=True)
class Axes:
    """The axes of a plot.

    Attributes:
        picture: that they are drawn on.
        x: horizontal scale.
        y: vertical scale, whose start is at the bottom.
    """

    picture: Picture
    x: Scale
    y: Scale

    def draw(
        self,
        x_label: str,
        y_label: str,
        x_format: Callable[[float], str],
        y_format: Callable[[float], str],
        x_ticks: Sequence[float] | None = None,
    ) -> None:
        """Draw horizontal grid lines, ticks and labels."""
        picture, x, y = self.picture, self.x, self.y
        for tick in y.ticks():
            picture.line([(x.start, y(tick)), (x.end, y(tick))], "grid")
            picture.text((x.start - 8, y(tick) + 4), y_format(tick), "tick", "end")
        for tick in x.ticks() if x_ticks is None else x_ticks:
            picture.line([(x(tick), y.start), (x(tick), y.start + 4)], "axis")
            picture.text((x(tick), y.start + 18), x_format(tick), "tick", "middle")
        picture.line([(x.start, y.start), (x.end, y.start)], "axis")
        picture.text((x.end, y.start + 36), x_label, "name", "end")
        picture.text((0, 12), y_label, "name")

    def at(self, x: float, y: float) -> Point:
        """The pixels of a point."""
        return self.x(x), self.y(y)


class Labels:
    """Places labels where they hide nothing that was placed before.

    Args:
        picture: that they are drawn on.
        taken: boxes (left, top, right, bottom) that are in use.
    """

    def __init__(self, picture: Picture, taken: Iterable[tuple[float, float, float, float]] = ()) -> None:
        self._picture, self._taken = picture, list(taken)

    def put(self, at: Point, text: str, kind: str, away: float = 8) -> None:
        """Write ``text`` beside a point, at the first free of eight places; not at all if none is free."""
        x, y = at
        width = LETTER * len(text)
        for dx, dy, anchor in (
            (0, -away - 2, "middle"), (away, 4, "start"), (-away, 4, "end"), (0, away + 11, "middle"),
            (away, -away, "start"), (-away, -away, "end"), (away, away + 8, "start"), (-away, away + 8, "end"),
        ):  # fmt: skip
            left = x + dx - {"start": 0, "middle": width / 2, "end": width}[anchor]
            box = (left, y + dy - 11, left + width, y + dy + 3)
            inside = box[0] >= 0 and box[2] <= self._picture.width and box[1] >= 0
            if inside and not any(_overlap(box, other) for other in self._taken):
                self._picture.text((x + dx, y + dy), text, kind, anchor)
                self._taken.append(box)
                return


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
