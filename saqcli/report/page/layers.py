"""The table of layers: bits, costs, how well grids fit, sensitivity and curvature, as far as a run recorded them."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from saqcli.analysis.distributions import DistributionsReading, LayerDistributions
from saqcli.analysis.flips import FlipsReading
from saqcli.analysis.hessian_trace import TraceReading
from saqcli.analysis.sensitivity import SensitivityReading
from saqcli.quant.bits import LayerBits, mean_bits
from saqcli.report.calibrated import OperandFit
from saqcli.report.page.charts import LayerBar, histogram
from saqcli.report.page.contents import Contents

MOST_PICTURED = 200  # layers; pictures of more distributions would make the page too large


@dataclass(frozen=True)
class LayerRow:
    """A line of the table of layers; None is unknown or in floating point.

    Attributes:
        name: of the layer.
        kind: class of its module.
        bits: of weights and inputs.
        pinned: whether its bits were fixed beforehand.
        share: of the network's bit-operations, 0 to 1.
        size: bytes of the weight.
        weights: fit of the weights' grid.
        inputs: fit of the inputs' grid.
        sensitivity: rise of a loss with this layer alone at the fewest bits.
        trace: curvature of the loss for a weight.
        flips: share of weights whose code a perturbation changes.
        pictures: distributions of weights and of inputs.
    """

    name: str
    kind: str
    bits: LayerBits
    pinned: bool
    share: float | None = None
    macs: int = 0
    size: int | None = None
    weights: OperandFit | None = None
    inputs: OperandFit | None = None
    sensitivity: float | None = None
    trace: float | None = None
    flips: float | None = None
    pictures: tuple[Markup, Markup] | None = None


def layer_rows(run: Contents) -> tuple[list[LayerRow], list[str]]:
    """The table of layers, and what its columns are of, as far as the run recorded them."""
    policy = run.policy
    calibrated = {layer.name: layer for layer in run.network.layers} if run.network else {}
    searched = {layer.name: layer for layer in run.searched.layers} if run.searched else {}
    readings = run.analyzed.readings if run.analyzed else {}
    notes = []
    distributions = readings.get("distributions")
    measured = (
        {one.name: one for one in distributions.layers}
        if isinstance(distributions, DistributionsReading)
        else {}
    )
    if measured or calibrated:
        when = "in the final network, by saq analyze" if measured else "at calibration, before any training"
        notes.append(
            "Error: squared error of rounding, of the squared values. Clipped: values beyond the outermost code. Codes "
            f"used: those that occur. All {when}."
        )
    sensitivity, note = _sensitivity(run, readings.get("sensitivity"))
    notes += [note] if note else []
    trace, flips = readings.get("trace"), readings.get("flips")
    traces = {one.name: one.per_weight for one in trace.layers} if isinstance(trace, TraceReading) else {}
    if traces:
        notes.append("Curvature: trace of the Hessian, for a weight.")
    flipped = {one.name: one.share for one in flips.layers} if isinstance(flips, FlipsReading) else {}
    if flipped:
        notes.append("Flips: weights whose code changes if they are perturbed within the radius of training.")
    total = run.quantized.bops if run.quantized else run.searched.bops if run.searched else 0
    rows = []
    for name, bits in policy.items():
        layer, cost = calibrated.get(name), searched.get(name)
        bops = layer.bops if layer else cost.bops if cost else None
        one = measured.get(name)
        rows.append(
            LayerRow(
                name=name,
                kind=layer.kind if layer else "",
                bits=bits,
                pinned=layer.pinned if layer else cost.pinned if cost else False,
                share=bops / total if bops is not None and total else None,
                macs=layer.macs if layer else cost.macs if cost else 0,
                size=layer.bytes if layer else None,
                weights=OperandFit.of(one.weights) if one else layer.weight_fit if layer else None,
                inputs=OperandFit.of(one.inputs) if one else layer.input_fit if layer else None,
                sensitivity=sensitivity.get(name),
                trace=traces.get(name),
                flips=flipped.get(name),
                pictures=_sparks(one) if one and len(policy) <= MOST_PICTURED else None,
            )
        )
    return rows, notes


def _sparks(layer: LayerDistributions) -> tuple[Markup, Markup]:
    """Small pictures of both distributions, empty in floating point."""
    weights, inputs = (
        Markup("")
        if operand is None
        else histogram(operand.histogram, f"Distribution of the {what} of {layer.name}")
        for what, operand in (("weights", layer.weights), ("inputs", layer.inputs))
    )
    return weights, inputs


def _sensitivity(run: Contents, reading: object) -> tuple[dict[str, float], str | None]:
    """The sensitivity of every layer, by analysis or by the search, and what it is."""
    if isinstance(reading, SensitivityReading) and any(layer.candidates for layer in reading.layers):
        lowest = min(one.bits for layer in reading.layers for one in layer.candidates)
        found = {
            layer.name: one.loss_change
            for layer in reading.layers
            for one in layer.candidates
            if one.bits == lowest and one.loss_change is not None
        }
        return found, f"Sensitivity: rise of the loss with this layer alone at {lowest} bits."
    if run.scores is not None:
        found = {
            name: max(losses.values()) - min(losses.values())
            for name, losses in run.scores.losses.items()
            if losses
        }
        return found, (
            f"Sensitivity: what searcher {run.scores.searcher} counts for this layer at its fewest bits, above that at "
            "its most; layers that share their bits have it once."
        )
    return {}, None


def bars_of(layers: Sequence[LayerRow]) -> list[LayerBar]:
    """The same layers in the picture of a policy."""
    return [LayerBar(each.name, each.bits, each.share, each.macs, each.pinned) for each in layers]


def means_of(layers: Sequence[LayerRow]) -> tuple[float, float]:
    """Mean bits of weights and of inputs, weighted by multiply-accumulates where these are known."""
    macs = {layer.name: layer.macs or 1 for layer in layers}
    return mean_bits({layer.name: layer.bits for layer in layers}, macs)
