"""Sparsity: the share of the quantized weights that are zero, and of the output channels that have no other weights."""

from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from saqcli.analysis import AnalysisInput, Instrument, Reading, Session, Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SparsitySettings(Settings):
    """The settings of all instruments, and one more.

    Attributes:
        threshold: weights up to this share of the layer's largest one count as zero.
    """

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0


class LayerSparsity(Reading):
    """One layer.

    Attributes:
        name: of the layer.
        weights: number of weights.
        zeros: share of the weights that are zero.
        dead_channels: share of the output channels whose weights are all zero.
    """

    name: str
    weights: int
    zeros: float
    dead_channels: float


class SparsityReading(Reading):
    """All layers in execution order; ``zeros`` is the share over all weights."""

    threshold: float
    zeros: float
    layers: tuple[LayerSparsity, ...]


@torch.no_grad()
def measure_sparsity(
    analyzed: AnalysisInput, settings: SparsitySettings, session: Session
) -> SparsityReading:
    """Count zeros, layer by layer."""
    layers, zeros = [], 0
    with session.progress.task("sparsity", len(analyzed.layers)) as task:
        for name, layer in analyzed.layers.items():
            size = layer.quantized_weight().abs()
            zero = (size <= settings.threshold * size.max()).movedim(layer.channel_dim, 0).flatten(1)
            zeros += int(zero.sum())
            layers.append(
                LayerSparsity(
                    name=name,
                    weights=zero.numel(),
                    zeros=float(zero.double().mean()),
                    dead_channels=float(zero.all(1).double().mean()),
                )
            )
            task.advance()
    total = sum(layer.weights for layer in layers)
    return SparsityReading(threshold=settings.threshold, zeros=zeros / total, layers=tuple(layers))


def paint_sparsity(readings: list[tuple[str, SparsityReading]], images: str = "") -> "dict[str, Figure]":
    """Figure ``sparsity``: one row per layer."""
    from saqcli.report.readings import bars_by_layer

    shares = [
        (name, {layer.name: 100 * layer.zeros for layer in reading.layers}) for name, reading in readings
    ]
    return {
        "sparsity": bars_by_layer(
            shares, "weights that are zero, in % of the layer's", "Weights at zero: sparsity"
        )
    }


def sparsity_table(reading: dict[str, Any]) -> dict[str, str]:
    """For the terminal."""
    return {"weights at zero": f"{100 * reading['zeros']:.2f} %"}


ENTRY = Instrument(
    measure_sparsity,
    SparsityReading,
    quick=False,
    description="Share of the quantized weights that are zero",
    schema=SparsitySettings,
    paint=paint_sparsity,
    table=sparsity_table,
)
