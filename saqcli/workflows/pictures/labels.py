"""Words beside what they name, where they hide nothing.

Every label has a few spots, the best first. It takes the one that does the least harm: hides no mark and no other
label, stays within the axes, crosses no line if possible, and is near. Away from its mark it gets a thin line to it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

OUTSIDE, HIDES, CROSSES, FAR = (
    1000.0,
    100.0,
    3.0,
    0.1,
)  # what is bad about a spot: each thing, and each point away
MARGIN = 1.5  # points around a text, whose size in a file is not quite that on the screen
NEAR = 8.0  # points from a mark, up to which no line to it is needed
CLEAR = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.4}  # behind text, above lines


class Spot(NamedTuple):
    """Where a label may stand.

    Attributes:
        right: points to the right of the place that it names.
        up: points above it.
        ha: which side of the text is there, as matplotlib has it.
        va: likewise.
        at: another place than the label's own.
    """

    right: float
    up: float
    ha: str
    va: str
    at: tuple[float, float] | None = None


def around(near: float = 5.0, rings: int = 5) -> list[Spot]:
    """Spots around a mark, below it to the right first, then further and further away."""
    sides = ((1, -1), (1, 1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
    horizontal, vertical = {1: "left", 0: "center", -1: "right"}, {1: "bottom", 0: "center", -1: "top"}
    return [
        Spot(x * near * ring, y * near * ring, horizontal[x], vertical[y])
        for ring in range(1, rings + 1)
        for x, y in sides
    ]


class Labels:
    """Those of one pair of axes, whose limits do not change any more.

    Args:
        ax: with everything else in it.
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
        self, text: str, place: tuple[float, float], spots: Sequence[Spot], coords: Any = None, **looks: Any
    ) -> None:
        """Write ``text`` at one of ``spots``.

        Args:
            text: a line.
            place: that it names, in ``coords``.
            spots: the best first.
            coords: a transform; that of the data by default.
            looks: go to matplotlib.
        """
        coords = self._ax.transData if coords is None else coords
        trial = self._ax.annotate(text, place, xycoords=coords, annotation_clip=False, **looks)
        size = trial.get_window_extent().size
        trial.remove()
        boxes = [self._box(spot, coords.transform(spot.at or place), size) for spot in spots]
        harm = [self._harm(box, spot) for box, spot in zip(boxes, spots, strict=True)]
        best = harm.index(min(harm))
        spot = spots[best]
        if spot.at is None and _distance(spot) > NEAR:
            looks["arrowprops"] = {"arrowstyle": "-", "linewidth": 0.5, "color": looks.get("color", "black")}
        self._ax.annotate(
            text, spot.at or place, xycoords=coords, xytext=(spot.right, spot.up), textcoords="offset points",
            ha=spot.ha, va=spot.va, bbox=CLEAR, annotation_clip=False, **looks,
        )  # fmt: skip
        self._taken = np.vstack([self._taken, boxes[best]])

    def _box(self, spot: Spot, place: Any, size: Any) -> Any:
        """Left, bottom, right and top of a text of that ``size`` at ``spot``, with a margin; all in pixels."""
        x, y = place + self._pixels * np.array([spot.right, spot.up])
        left = x - size[0] * {"left": 0.0, "center": 0.5, "right": 1.0}[spot.ha]
        bottom = y - size[1] * {"bottom": 0.0, "center": 0.5, "top": 1.0}[spot.va]
        margin = MARGIN * self._pixels
        return np.array([left - margin, bottom - margin, left + size[0] + margin, bottom + size[1] + margin])

    def _harm(self, box: Any, spot: Spot) -> float:
        from matplotlib.transforms import Bbox

        room = self._ax.bbox.padded(MARGIN * self._pixels).extents
        outside = (box[:2] < room[:2]).any() or (box[2:] > room[2:]).any()
        hidden = ((self._taken[:, :2] < box[2:]) & (self._taken[:, 2:] > box[:2])).all(1).sum()
        crossed = sum(line.intersects_bbox(Bbox.from_extents(*box), filled=False) for line in self._lines)
        return float(OUTSIDE * outside + HIDES * hidden + CROSSES * crossed + FAR * _distance(spot))


def _distance(spot: Spot) -> float:
    """Points from the place that is named."""
    return max(abs(spot.right), abs(spot.up))
