"""Common style of all plots: fonts, color-blind-safe colors, reproducible files."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saqcli.serialization import replacing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

# Okabe and Ito's palette for color-blind readers: blue for the first model, vermilion for the second.
COLORS = ("#0072B2", "#D55E00")
ACCENT, INK, FAINT = "#E69F00", "#222222", "#B8B8B8"
PIXELS_PER_INCH = 160
LONGEST_NAME = 26  # maximum characters of a layer's name
CHARACTER = 0.6  # width of a letter relative to the font size; bold letters are wider
TITLE_SIZE = 10.0  # points

_STYLE = {
    "font.size": 9.0,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "axes.titlesize": TITLE_SIZE,
    "figure.titlesize": TITLE_SIZE,
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
    "text.parse_math": False,  # a path may contain a dollar sign
    "svg.hashsalt": "saq",  # without it the ids in an SVG are random
}


@contextmanager
def style() -> Iterator[None]:
    """Within the context figures have the same style, independent of matplotlib's configuration."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as an empty box
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure with constrained layout; width and height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def put_title(figure: "Figure", *lines: str) -> None:
    """Set the title above all axes; a line wider than the figure is shortened in the middle."""
    figure.suptitle(
        "\n".join(shortened_to_width(line, float(figure.get_figwidth())) for line in lines if line)
    )


def with_images(text: str, images: str) -> str:
    """``text``, followed by ``images`` if given."""
    return f"{text}, {images}" if images else text


def put_legend(figure: "Figure", handles: "Sequence[Artist]", **options: Any) -> None:
    """Add a legend below all axes."""
    if handles:
        options.setdefault("ncols", len(handles))
        figure.legend(handles=list(handles), loc="outside lower center", **options)


def save(figure: "Figure", path: Path) -> list[Path]:
    """Write ``path`` plus ``.png`` and plus ``.svg``; without dates, so that equal figures give equal files."""
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        target = path.with_name(path.name + suffix)
        with replacing(target) as temporary:
            figure.savefig(temporary, dpi=PIXELS_PER_INCH, metadata=metadata)
        figure.set_layout_engine("none")  # the second file reuses the layout of the first
        written.append(target)
    return written


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """``name``, with its middle omitted if it is longer than ``longest``."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 3
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"


def shortened_to_width(text: str, inches: float, size: float = TITLE_SIZE) -> str:
    """``text``, shortened to one line of the given width in letters of ``size`` points."""
    return shortened(text, max(8, int(inches * 72 / (CHARACTER * size))))


def titles(targets: list[str]) -> list[str]:
    """Names of models in a plot: the shortest distinct ends of their paths."""
    parts = [Path(target).parts or (target,) for target in targets]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=False)]


def model_names(models: "Sequence[tuple[str, str]]") -> list[str]:
    """Names of models in a plot.

    Args:
        models: canonical name of each network, and the target that it was loaded from.

    Returns:
        The network's name, followed by the target in brackets if that differs.
    """
    places = titles([target for _, target in models])
    return [
        network if place == Path(network).name else f"{network} ({place})"
        for (network, _), place in zip(models, places, strict=True)
    ]
