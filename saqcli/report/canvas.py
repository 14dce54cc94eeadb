"""What all pictures share: type, colours that colour-blind people can tell apart, and files that come out the
same every time."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saqcli.serialization import replacing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

# Okabe and Ito's palette for colour-blind readers: blue for the first model, vermilion for the second.
COLOURS = ("#0072B2", "#D55E00")
ACCENT, INK, FAINT = "#E69F00", "#222222", "#B8B8B8"
PIXELS_PER_INCH = 160
LONGEST_NAME = 26  # characters of a layer's name that a picture has room for
CHARACTER = 0.6  # width of a letter, in sizes of its type; bold ones are wider
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
    "text.parse_math": False,  # a path may have a dollar in it
    "svg.hashsalt": "saq",  # otherwise the ids in an SVG are random
}


@contextmanager
def style() -> Iterator[None]:
    """Within the context figures are drawn and saved alike, whatever matplotlib was configured to."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as an empty box
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, sides in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def put_title(figure: "Figure", *lines: str) -> None:
    """What a figure shows, above everything else; a line that is wider than the figure loses its middle."""
    figure.suptitle("\n".join(fitted(line, float(figure.get_figwidth())) for line in lines if line))


def of_images(text: str, images: str) -> str:
    """``text``, and of which images it is, if that is known."""
    return f"{text}, {images}" if images else text


def put_legend(figure: "Figure", handles: "Sequence[Artist]", **options: Any) -> None:
    """What the marks of a figure mean, below everything else."""
    if handles:
        options.setdefault("ncols", len(handles))
        figure.legend(handles=list(handles), loc="outside lower center", **options)


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


def fitted(text: str, inches: float, size: float = TITLE_SIZE) -> str:
    """``text`` as far as there is room for it in one line of letters of ``size`` points."""
    return shortened(text, max(8, int(inches * 72 / (CHARACTER * size))))


def titles(targets: list[str]) -> list[str]:
    """What models are called in a picture: the last parts of their paths, as few as tell them apart."""
    parts = [Path(target).parts or (target,) for target in targets]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({letter})" for name, letter in zip(names, "AB", strict=False)]


def model_names(models: "Sequence[tuple[str, str]]") -> list[str]:
    """What models are called in a picture.

    Args:
        models: canonical name of each network, and the target that it was opened by.

    Returns:
        The network, and behind it in brackets where it came from, if that is another name.
    """
    places = titles([target for _, target in models])
    return [
        network if place == Path(network).name else f"{network} ({place})"
        for (network, _), place in zip(models, places, strict=True)
    ]
