"""What all pictures share: type, colours that colour-blind people can tell apart, and files that come out the
same every time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from saqcli.io.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers: blue for the first model, vermilion for the second.
COLOURS = ("#0072B2", "#D55E00")
ACCENT, INK, FAINT = "#E69F00", "#222222", "#B8B8B8"
PIXELS_PER_INCH = 160
LONGEST_NAME = 26  # characters of a layer's name that a picture has room for

_STYLE = {
    "font.size": 9.0,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.0,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a path may have a dollar in it
    "svg.hashsalt": "saq",  # otherwise the ids in an SVG are random
}


@contextmanager
def style() -> Iterator[None]:
    """Within the context figures are drawn and saved alike, whatever matplotlib was configured to."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, sides in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: "Figure", path: Path) -> list[Path]:
    """Write ``path`` plus ``.png`` and plus ``.svg``; without a date, so that equal figures are equal files."""
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        target = path.with_name(path.name + suffix)
        with replacing(target) as temporary:
            figure.savefig(temporary, dpi=PIXELS_PER_INCH, metadata=metadata)
        figure.set_layout_engine("none")  # the second file takes the places that the first one found
        written.append(target)
    return written


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """``name`` with its middle left out where there is no room for it."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 3
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"


def titles(targets: list[str]) -> list[str]:
    """What models are called in a picture: the last parts of their paths, as few as tell them apart."""
    parts = [Path(target).parts or (target,) for target in targets]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=False)]
