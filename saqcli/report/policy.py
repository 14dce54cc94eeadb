"""Bar chart of a bit configuration, one column per layer in execution order.

Bars of weights point upwards, bars of inputs downwards.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saqcli.quant.bits import FLOAT_BITS, MAX_BITS, BitConfig, LayerBits, mean_bits
from saqcli.quant.cost import CostModel
from saqcli.report.canvas import FAINT, INK, new_figure, put_legend, put_title, save, shortened, style

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

WIDE, NARROW = 0.24, 0.15  # inches per layer, for few and for many
FEW, MANY = 30, 90  # layers
MARGIN = 1.9  # inches for the axis and the color bar
LEAST_WIDTH = 6.6  # inches for the line below the title
FEWEST_COLUMNS = 14  # width limit for bars of few layers
FLOAT_HEIGHT = MAX_BITS + 1  # height of a bar for floating point: above all others, hatched
NUMBER = 0.18  # bits between the end of a bar and its number
CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # box behind numbers
MEAN = (0, (4, 2))  # dashes
LIGHTEST = 0.2  # start of the color map; lighter colors would not be visible on white


def draw_policy(config: BitConfig, costs: CostModel, path: Path, title: str) -> list[Path]:
    """Draw a bit configuration to files.

    Args:
        config: the bits of every layer.
        costs: of the same network.
        path: of the files, without a suffix.
        title: of the figure.

    Returns:
        Paths of the PNG and the SVG.
    """
    with style():
        return save(paint_policy(config, costs, title), path)


def paint_policy(config: BitConfig, costs: CostModel, title: str) -> "Figure":
    """Bars as high as the bits, colored by the layer's share of the network's BOPs."""
    names = [layer.name for layer in costs.layers]
    share_out = (len(names) - FEW) / (MANY - FEW)
    column = WIDE + (NARROW - WIDE) * min(max(share_out, 0.0), 1.0)
    figure = new_figure(max(LEAST_WIDTH, MARGIN + column * len(names)), 4.3)
    ax: Any = figure.subplots()
    _bars(figure, ax, config, costs, small=column < WIDE)
    _means(ax, config, costs)
    _axes(ax, names, small=column < WIDE)
    put_title(figure, title)
    ax.set_title(_summary(config, costs), loc="left", fontsize=8, fontweight="normal")
    _legend(figure, config, costs)
    return figure


def _summary(config: BitConfig, costs: CostModel) -> str:
    """The line below the title."""
    weights, inputs = _mean(config, costs)
    text = f"mean bits of a multiply-accumulate: weights {weights:.2f}, inputs {inputs:.2f};  {costs.cost(config)}"
    apart = sum(layer.macs for layer in costs.unquantized)
    return text + (f"\n{100 * apart / costs.macs:.1f} % of the MACs are outside the layers" if apart else "")


def _mean(config: BitConfig, costs: CostModel) -> tuple[float, float]:
    return mean_bits(config.layers, {layer.name: layer.macs for layer in costs.layers})


def _bars(figure: "Figure", ax: Any, config: BitConfig, costs: CostModel, *, small: bool) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    total = costs.bops(config) or 1
    shares = [100 * layer.bops(config.layers[layer.name]) / total for layer in costs.layers]
    colors: Any = ScalarMappable(Normalize(0, max(shares) or 1), _map())
    for at, (layer, share) in enumerate(zip(costs.layers, shares, strict=True)):
        bits = config.layers[layer.name]
        pinned = _is_pinned(bits, layer.pinned)
        for sign, width in ((1, bits.weight), (-1, bits.activation)):
            height = FLOAT_HEIGHT if width is None else width
            ax.bar(
                at, sign * height, width=0.78, color=colors.to_rgba(share), zorder=2, linewidth=1.0,
                edgecolor=INK if pinned else "white" if width is None else "none",
                hatch="////" if width is None else None,
            )  # fmt: skip
            ax.text(
                at, sign * (height + NUMBER), str(width or FLOAT_BITS), fontsize=6 if small else 7, ha="center",
                va="bottom" if sign > 0 else "top", color=INK, bbox=CLEAR, zorder=3,
            )  # fmt: skip
    bar = figure.colorbar(colors, ax=ax, pad=0.012, aspect=28, fraction=0.05, format="{x:g} %")
    bar.set_label("share of the network's BOPs")
    bar.outline.set_visible(False)


def _map() -> "Colormap":
    """A color map from light to dark, distinguishable for color-blind readers and in grayscale."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    whole = matplotlib.colormaps["YlGnBu"]
    return ListedColormap([whole(LIGHTEST + (1 - LIGHTEST) * k / 255) for k in range(256)])


def _is_pinned(bits: LayerBits, pinned: LayerBits | None) -> bool:
    """Whether a layer has its pinned bits."""
    return pinned is not None and bits == pinned


def _means(ax: Any, config: BitConfig, costs: CostModel) -> None:
    """Draw a dashed line at the mean bits, if it is in view."""
    for sign, mean in zip((1, -1), _mean(config, costs), strict=True):
        if mean <= FLOAT_HEIGHT:
            ax.axhline(sign * mean, color=INK, linewidth=0.9, linestyle=MEAN, zorder=1)


def _axes(ax: Any, names: list[str], *, small: bool) -> None:
    """Label the layers below and the bits at the side."""
    most = FLOAT_HEIGHT + 1
    bits = range(2, MAX_BITS + 1, 2)
    ticks = [*(-b for b in reversed(bits)), 0, *bits]
    ax.set_yticks(ticks, [str(abs(tick)) for tick in ticks])
    ax.set_ylim(-most, most)
    ax.set_xlim(-0.7, max(len(names), FEWEST_COLUMNS) - 0.3)
    ax.set_xticks(range(len(names)), [shortened(name) for name in names], rotation=90)
    ax.tick_params(axis="x", length=0, labelsize=6 if small else 7.5)
    ax.tick_params(axis="y", length=2)
    ax.grid(axis="y", color=FAINT, linewidth=0.4, alpha=0.6, zorder=0)
    ax.axhline(0, color=INK, linewidth=0.8, zorder=4)
    ax.set_xlabel("layer, in execution order")
    ax.set_ylabel("←  inputs    bits    weights  →")
    for side in ("bottom", "left"):
        ax.spines[side].set_visible(False)


def _legend(figure: "Figure", config: BitConfig, costs: CostModel) -> None:
    """Add a legend of the outlines, hatches and dashes in use."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    every = [(config.layers[layer.name], layer.pinned) for layer in costs.layers]
    marks: list[Any] = [
        Line2D([], [], color=INK, linewidth=0.9, linestyle=MEAN, label="mean, weighted by MACs")
    ]
    if any(_is_pinned(bits, pinned) for bits, pinned in every):
        marks.append(Patch(facecolor="white", edgecolor=INK, label="pinned: fixed beforehand"))
    if any(None in (bits.weight, bits.activation) for bits, _ in every):
        marks.append(
            Patch(
                facecolor=FAINT,
                edgecolor="white",
                hatch="////",
                label=f"left in floating point ({FLOAT_BITS} bits)",
            )
        )
    put_legend(figure, marks)
