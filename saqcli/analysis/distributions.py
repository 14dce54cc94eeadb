"""Every layer's weights and inputs on their grids: clipping, code usage, error.

Values are in units of the step, so that the levels are at the integer codes for every channel scale. Weights are the
latent ones if available; inputs are a sample of the values that reach the quantizer in the quantized model.
"""

from typing import Any

import torch
from pydantic import SerializerFunctionWrapHandler, model_serializer
from torch import Tensor

from saqcli.analysis.base import AnalysisInput, Reading, Session, Settings, observe_inputs
from saqcli.quant.grid import Grid, ShiftedGrid
from saqcli.quant.quantizers import Quantizer

BINS = 96  # per histogram
HISTOGRAM_MARGIN = 0.25  # extent of a histogram beyond the outermost codes, as a share of their distance


class Operand(Reading):
    """Values of one tensor on its grid.

    Attributes:
        bits: of the grid.
        values: number of values.
        lowest: least code.
        highest: greatest code.
        stride: distance between neighboring codes; None on a table of levels.
        table: the codes of such a grid, ascending, in steps; missing on a uniform grid.
        clipped: share of values beyond the outermost codes, 0 to 1.
        zero: share of values with code 0; 0 on a grid without zero.
        used: share of the codes that occur.
        entropy: of the codes, in bits; at most ``bits``.
        error: squared error divided by the squared values.
        codes: share of every code, ascending; sums to 1.
        edges: first and last edge of the histogram, in codes.
        histogram: share of values in each of equally wide bins; the outermost bins include all values beyond them.
    """

    bits: int
    values: int
    lowest: int | float
    highest: int | float
    stride: int | None
    clipped: float
    zero: float
    used: float
    entropy: float
    error: float
    codes: list[float]
    edges: tuple[float, float]
    histogram: list[float]
    table: list[float] | None = None

    @model_serializer(mode="wrap", when_used="json")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key != "table" or value is not None}


class LayerDistributions(Reading):
    """Both operands of a layer; None for one in floating point."""

    name: str
    weights: Operand | None
    inputs: Operand | None


class DistributionsReading(Reading):
    """The distributions of all layers.

    Attributes:
        latent: whether weights are those of training; otherwise they are already on the grid.
        layers: in execution order.
    """

    latent: bool
    layers: list[LayerDistributions]


@torch.no_grad()
def measure_distributions(
    analyzed: AnalysisInput, settings: Settings, session: Session
) -> DistributionsReading:
    """Measure weights directly, and inputs over all images."""
    with session.progress.task("distributions", len(analyzed.batches)) as task:
        statistics = observe_inputs(analyzed, settings.seed, task)
    layers = []
    for name, layer in analyzed.layers.items():
        inputs = statistics[name].samples.to(layer.latent_weight())
        layers.append(
            LayerDistributions(
                name=name,
                weights=operand_of(layer.weight_quantizer, layer.effective_weight()),
                inputs=operand_of(layer.input_quantizer, inputs),
            )
        )
    return DistributionsReading(latent=analyzed.latent, layers=layers)


@torch.no_grad()
def operand_of(quantizer: object, x: Tensor) -> Operand | None:
    """The values ``x``, of any shape, on the grid of ``quantizer``; None if that is no quantizer."""
    if not isinstance(quantizer, Quantizer):
        return None
    quantizer, x = quantizer.fold(x.detach())  # in units of its step
    grid, step = quantizer.grid(), quantizer.step().double()
    codes = quantizer.codes(x)
    hull = grid.hull if isinstance(grid, ShiftedGrid) else grid
    counts = torch.bincount(hull.indices(codes).flatten(), minlength=hull.levels).double().cpu()
    shares = counts / counts.sum()
    scaled = x.double() / step
    present = shares[shares > 0]
    power = float(x.double().square().sum())
    error = float((codes * step - x.double()).square().sum())
    reach = HISTOGRAM_MARGIN * (hull.highest - hull.lowest)
    first, last = hull.lowest - reach, hull.highest + reach
    if hull.lowest == 0:
        first = -0.5  # no values below 0
    histogram = torch.histc(scaled.clamp(first, last).float().cpu(), BINS, first, last)
    return Operand(
        bits=quantizer.bits,
        values=x.numel(),
        lowest=hull.lowest,
        highest=hull.highest,
        stride=hull.stride if isinstance(hull, Grid) else None,
        clipped=float(((scaled > grid.highest) | (scaled < grid.lowest)).double().mean()),
        zero=float((codes == 0).double().mean()),
        used=float((counts > 0).double().mean()),
        entropy=max(0.0, -float((present * present.log2()).sum())),
        error=error / power if power > 0 else 0.0,
        codes=shares.tolist(),
        edges=(float(first), float(last)),
        histogram=(histogram.double() / x.numel()).tolist(),
        table=None if isinstance(hull, Grid) else list(hull.codes),
    )
