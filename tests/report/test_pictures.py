"""Figures of readings: text is complete, inside the figure, and describes it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from saqcli.analysis import INSTRUMENTS, Session, Settings
from saqcli.analysis.distributions import DistributionsReading, LayerDistributions, Operand
from saqcli.analysis.eigenvalue import EigenvalueReading, Start
from saqcli.analysis.flips import FlipsReading, LayerFlips
from saqcli.analysis.hessian_trace import LayerTrace, TraceReading
from saqcli.analysis.landscape import LandscapeReading, axis_of
from saqcli.analysis.sensitivity import Candidate, LayerSensitivity, SensitivityReading
from saqcli.report.canvas import model_names, style
from saqcli.report.readings import painter_of
from tests.support.analyzed import subject_of

LONG = "runs/" + "stages.3.blocks.11.a_layer_with_quite_a_long_name." * 3 + "conv"
LAYERS = {
    "one layer": ["conv"],
    "many layers": [f"layer{k // 4}.{k % 4}.conv" for k in range(12)],
    "long names": [f"{LONG}{k}" for k in range(3)],
}


def eigenvalue(values: list[float]) -> EigenvalueReading:
    starts = [Start(eigenvalue=v, iterations=9, converged=k > 0, residual=0.1) for k, v in enumerate(values)]
    spread = max(values) - min(values)
    return EigenvalueReading(
        eigenvalue=max(values), mean=values[0], spread=spread, starts=starts, lowest=None
    )


def trace(names: list[str], unit: float) -> TraceReading:
    layers = [
        LayerTrace(name=name, weights=10, trace=unit * (k + 1), standard_error=unit / 3, per_weight=unit * k)
        for k, name in enumerate(names)
    ]
    return TraceReading(layers=layers, trace=unit, standard_error=unit / 3, samples=2)


def flips(names: list[str], share: float) -> FlipsReading:
    layers = tuple(
        LayerFlips(
            name=name, weights=9, bits=4, flipped=1, share=share, relative_size=3 * share, norm_ratio=1.0
        )
        for name in names
    )
    return FlipsReading(reason=None, rho=0.9, rho_unit="deviation", layers=layers)


def distributions(names: list[str], peak: int | None) -> DistributionsReading:
    histogram = np.full(96, 1 / 96) if peak is None else np.where(np.arange(96) == peak, 0.9, 0.1 / 95)
    operand = Operand(
        bits=4, values=9, lowest=-15, highest=15, stride=2, clipped=0.01, zero=0.0, used=1.0, entropy=3.0,
        error=0.1, codes=[1 / 16] * 16, edges=(-20.0, 20.0), histogram=histogram.tolist(),
    )  # fmt: skip
    layers = [LayerDistributions(name=name, weights=operand, inputs=operand) for name in names]
    return DistributionsReading(latent=True, layers=layers)


def sensitivity(names: list[str], changes: list[float | None]) -> SensitivityReading:
    candidates = [
        Candidate(bits=2 + k, loss=change, top1=9.0, loss_change=change, top1_change=-1.0 - k)
        for k, change in enumerate(changes)
    ]
    layers = [
        LayerSensitivity(name=name, weight_bits=2, activation_bits=2, candidates=candidates) for name in names
    ]
    return SensitivityReading(loss=0.25, top1=91.5, layers=layers)


def landscape(unit: float | None, rise: float, span: float = 1.0) -> LandscapeReading:
    axis = np.array(axis_of(7, span)) / span
    squares = axis[:, None] ** 2 + 3 * axis[None, :] ** 2
    loss = [[None if unit is None else unit * (1 + rise * v) for v in row] for row in squares.tolist()]
    return LandscapeReading(grid=7, span=span, done=49, loss=loss, top1=loss, cosine=0.0)


def _every() -> Iterator[Any]:
    for what, names in LAYERS.items():
        readings: dict[str, Any] = {
            "trace": trace(names, 1e9),
            "flips": flips(names, 0.5),
            "distributions": distributions(names, 95),
            "sensitivity": sensitivity(names, [1e9, -1e-9, 0.0]),
        }
        for name, reading in readings.items():
            yield pytest.param(name, [(LONG, reading)], id=f"{name}, {what}")
    yield pytest.param("trace", [("a", trace(["b"], 1e-9)), (LONG, trace(["b"], 1.0))], id="two traces")
    yield pytest.param("flips", [("a", flips(["b"], 0.0)), (LONG, flips(["b"], 1.0))], id="two flips")
    yield pytest.param("sensitivity", [("a", sensitivity(["b"], [None]))], id="sensitivity, NaN")
    yield pytest.param("sensitivity", [("a", sensitivity(["b"], [0.0]))], id="sensitivity, nothing")
    found = [[67.25, 66.0], [1.234e9, 2e8], [1e-9, 0.9e-9], [-3.0, -1000.0], [0.0]]
    for values in found:
        yield pytest.param("eigenvalue", [(LONG, eigenvalue(values))], id=f"eigenvalue {values[0]:g}")
    yield pytest.param("eigenvalue", [("a", eigenvalue([1e9])), ("b", eigenvalue([1e-9]))], id="two values")
    surfaces = {
        "steep": landscape(1e-3, 5e4),
        "flat": landscape(2.3, 0.0),
        "nearly flat": landscape(2.3, 1e-4),
        "zero": landscape(0.0, 0.0),
        "tiny": landscape(1e-9, 1.0),
        "huge": landscape(1e9, 1.0),
        "NaN": landscape(None, 0.0),
        "wide": landscape(0.1, 99.0, span=12345.0),
    }
    for what, surface in surfaces.items():
        yield pytest.param("landscape", [("saq/resnet20", surface)], id=f"landscape, {what}")
    yield pytest.param(
        "landscape", [(LONG, surfaces["steep"]), (LONG, surfaces["tiny"])], id="two landscapes"
    )


def _measured() -> Iterator[Any]:
    """Readings of the instruments of other packages, if any are installed."""
    for name, instrument in INSTRUMENTS.items():
        if instrument.paint is not None:
            settings = instrument.settings_with(Settings(), {})
            reading = instrument.measure(subject_of("residual", dtype=torch.float32), settings, Session())
            yield pytest.param(name, [(LONG, reading)], id=f"{name}, measured")
            yield pytest.param(name, [("a", reading), (LONG, reading)], id=f"two {name}, measured")


EVERY = [*_every(), *_measured()]
Drawn = tuple[Any, list[Any], list[Any]]
_drawn: dict[int, list[Drawn]] = {}  # of the readings in EVERY, which are drawn once


def figures(instrument: str, subjects: list[tuple[str, Any]]) -> list[Drawn]:
    """Every figure with its texts and their bounding boxes."""
    if id(subjects) in _drawn:
        return _drawn[id(subjects)]
    with style():
        paint = painter_of(instrument)
        assert paint
        found = [_draw(one) for one in paint(subjects, "500 training images").values()]
    if any(subjects is one.values[1] for one in EVERY):
        _drawn[id(subjects)] = found
    return found


def _draw(figure: Any) -> Drawn:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    texts: list[Any] = []
    extents: list[Any] = []
    plain = Text.draw

    def draw(text: Any, renderer: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            texts.append(text)
            extents.append(text.get_window_extent(renderer))
        plain(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", draw)
        FigureCanvasAgg(figure).draw()
    assert texts
    return figure, texts, extents


def overlap(one: Any, other: Any) -> bool:
    """Whether two boxes share more than a pixel."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return bool(width > 1 and height > 1)


def within(one: Any, other: Any) -> bool:
    """Whether a box lies in another, to a pixel."""
    low = one.x0 >= other.x0 - 1 and one.y0 >= other.y0 - 1
    return bool(low and one.x1 <= other.x1 + 1 and one.y1 <= other.y1 + 1)


@pytest.mark.parametrize(("instrument", "subjects"), EVERY)
def test_text_is_never_clipped_or_overlapping(instrument: str, subjects: list[tuple[str, Any]]) -> None:
    for figure, texts, extents in figures(instrument, subjects):
        for text, extent in zip(texts, extents, strict=True):
            said = text.get_text()
            assert within(extent, figure.bbox), said
            if text.get_clip_on() and text.get_clip_box() is not None:
                assert within(extent, text.get_clip_box()), said  # "30" would be cut to "3"
            for ax in figure.axes:
                covers = ax is not text.axes and ax.get_visible() and ax.patch.get_visible()
                assert not (covers and overlap(extent, ax.bbox)), said
            assert "$" not in said, said
        named = [e for t, e in zip(texts, extents, strict=True) if t.axes and t is t.axes.title]
        assert not any(overlap(one, other) for k, one in enumerate(named) for other in named[:k])


@pytest.mark.parametrize(("instrument", "subjects"), EVERY)
def test_titles_describe_the_figure(instrument: str, subjects: list[tuple[str, Any]]) -> None:
    words = {"eigenvalue": "eigenvalue", "trace": "trace", "flips": "Flips", "distributions": "grids"}
    words |= {"sensitivity": "other bits", "landscape": "landscape"}
    for figure, texts, _ in figures(instrument, subjects):
        title = figure.get_suptitle()
        assert words.get(instrument, instrument).lower() in title.lower()
        if "Weights" not in title:  # which are the same on all images
            assert "500 training images" in title
        assert any("conv" in text.get_text() or subjects[0][0] in text.get_text() for text in texts)


@pytest.mark.parametrize(("instrument", "subjects"), EVERY)
def test_legend_entries_have_marks(instrument: str, subjects: list[tuple[str, Any]]) -> None:
    for figure, _, _ in figures(instrument, subjects):
        for legend in figure.legends:
            assert len(legend.legend_handles) == len(legend.get_texts()) > 0
            assert all(handle is not None and handle.get_visible() for handle in legend.legend_handles)
            assert all(text.get_text() for text in legend.get_texts())


class TestLandscape:
    def test_axes_and_colour_bar_are_labelled(self) -> None:
        found = list(figures("landscape", [("a", landscape(1e-3, 5e4)), ("b", landscape(1e-3, 5e4))]))

        for figure, texts, _ in found:
            assert figure.axes[-1].get_ylabel() == "cross-entropy loss (log scale)"
            said = [text.get_text() for text in texts]
            assert {"a", "b"} <= {text.split("\n")[0] for text in said}
        surface = found[1][0]
        assert [ax.get_zlabel() for ax in surface.axes[:2]] == ["cross-entropy loss (log scale)"] * 2

    def test_colour_scale_spans_the_data(self) -> None:
        ((contour, _, _), _) = figures("landscape", [("a", landscape(1e-9, 0.5))])

        low, high = contour.axes[-1].get_ylim()
        assert 10**low == pytest.approx(1e-9, rel=1e-3)
        assert 10**high == pytest.approx(3e-9, rel=1e-3)

    def test_nan_is_drawn_as_gap(self) -> None:
        reading = landscape(1.0, 8.0)
        reading.loss[0][0] = None

        for _, texts, _ in figures("landscape", [("a", reading)]):
            assert "gap: the loss is NaN or infinite" in [text.get_text() for text in texts]


class TestSensitivity:
    def test_each_panel_has_a_colour_bar(self) -> None:
        ((figure, _, _),) = figures("sensitivity", [("a", sensitivity(["b"], [2.5, -0.5, 0.1]))])

        loss, top1, loss_bar, top1_bar = figure.axes
        assert [tick.get_text() for tick in loss_bar.get_xticklabels()] == [
            "-2.5",
            "-0.25",
            "0",
            "+0.25",
            "+2.5",
        ]
        assert [tick.get_text() for tick in top1_bar.get_xticklabels()] == ["-3", "-1.5", "0", "+1.5", "+3"]
        orange = top1.images[0].to_rgba(np.array([[-3.0]]))[0, 0]
        assert np.allclose(orange, loss.images[0].to_rgba(np.array([[2.5]]))[0, 0])  # both are worse
        assert orange[0] > orange[2]

    def test_tiny_changes_are_printed(self) -> None:
        ((_, texts, _),) = figures("sensitivity", [("a", sensitivity(["b"], [2e-9, -1e-9, 0.0]))])

        assert {"+2e-09", "-1e-09", "0"} <= {text.get_text() for text in texts}

    def test_nan_change_is_labelled(self) -> None:
        ((_, texts, _),) = figures("sensitivity", [("a", sensitivity(["b"], [None, 1.0]))])

        assert {"NaN", "loss NaN or infinite"} <= {text.get_text() for text in texts}


def test_value_and_error_have_equal_decimals() -> None:
    ((_, texts, _),) = figures("eigenvalue", [("a", eigenvalue([892.7, 769.3]))])

    assert "893\nspread 123, not converged" in [text.get_text() for text in texts]


def test_model_labels_name_network_and_run() -> None:
    assert model_names([("saq/resnet20", "runs/w4")]) == ["saq/resnet20 (w4)"]
    assert model_names([("saq/resnet20", "saq/resnet20")]) == ["saq/resnet20"]
    assert model_names([("m", "a/run"), ("m", "b/run")]) == ["m (a/run)", "m (b/run)"]
