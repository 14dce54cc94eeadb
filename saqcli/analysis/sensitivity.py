"""Loss and accuracy of the model with one layer at other bits.

Weights and inputs of the layer get newly fitted quantizers at the candidate's bits, as in calibration; all other
layers are unchanged. Changes are relative to the unchanged model, also at the layer's own bits, where fitted levels
replace the trained ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from saqcli.analysis.base import AnalysisInput, Reading, Session, Settings, finite_or_none, observe_inputs
from saqcli.quant.calibration import InputStatistics
from saqcli.quant.layer import QuantizedLayer
from saqcli.quant.quantizers import Quantizer


class Candidate(Reading):
    """The model with one layer at other bits.

    Attributes:
        bits: of the layer's weights and inputs.
        loss: of the model; None if it is NaN or infinite.
        top1: percent.
        loss_change: relative to the unchanged model; positive is worse; None if the loss is NaN or infinite.
        top1_change: in points; negative is worse.
    """

    bits: int
    loss: float | None
    top1: float
    loss_change: float | None
    top1_change: float


class LayerSensitivity(Reading):
    """One layer at every candidate.

    Attributes:
        name: of the layer.
        weight_bits: current bits of the weights; None in floating point.
        activation_bits: current bits of the inputs; None in floating point.
        candidates: ascending.
    """

    name: str
    weight_bits: int | None
    activation_bits: int | None
    candidates: list[Candidate]


class SensitivityReading(Reading):
    """Every layer at every candidate.

    Attributes:
        loss: of the unchanged model.
        top1: percent.
        layers: in execution order.
    """

    loss: float
    top1: float
    layers: list[LayerSensitivity]


def measure_sensitivity(analyzed: AnalysisInput, settings: Settings, session: Session) -> SensitivityReading:
    """Evaluate the model once for every layer and candidate."""
    candidates = sorted(set(settings.candidates))
    base = analyzed.score()
    rows = []
    steps = len(analyzed.batches) + len(analyzed.layers) * len(candidates)
    with session.progress.task("sensitivity", steps) as task:
        statistics = observe_inputs(analyzed, settings.seed, task)
        for name, layer in analyzed.layers.items():
            row = []
            for bits in candidates:
                with at_bits(analyzed, layer, bits, statistics[name]):
                    score = analyzed.score()
                row.append(
                    Candidate(
                        bits=bits,
                        loss=finite_or_none(score.loss),
                        top1=score.top1,
                        loss_change=finite_or_none(score.loss - base.loss),
                        top1_change=score.top1 - base.top1,
                    )
                )
                task.advance(images=analyzed.images, loss=score.loss, top1=score.top1)
            now = layer.bits
            rows.append(
                LayerSensitivity(
                    name=name, weight_bits=now.weight, activation_bits=now.activation, candidates=row
                )
            )
    return SensitivityReading(loss=base.loss, top1=base.top1, layers=rows)


@contextmanager
def at_bits(
    analyzed: AnalysisInput, layer: QuantizedLayer, bits: int, statistics: InputStatistics
) -> Iterator[None]:
    """Within the context ``layer`` has fitted quantizers at ``bits``; its own are restored afterwards, bit for bit."""
    owner = layer.tied_to[0] if layer.tied_to else layer  # the layer that quantizes the weight
    before: tuple[nn.Module, nn.Module] = owner.weight_quantizer, layer.input_quantizer
    own = before[1]
    signed = bool(own.grid().lowest < 0) if isinstance(own, Quantizer) else statistics.signed
    like = layer.latent_weight()
    weight = analyzed.scheme.new_weight_quantizer(layer, [bits]).to(like)
    inputs = analyzed.scheme.new_input_quantizer(layer, [bits], signed=signed).to(like)
    weight.fit(layer.effective_weight().detach())
    inputs.fit(statistics.samples.to(like))
    try:
        owner.weight_quantizer, layer.input_quantizer = weight.eval(), inputs.eval()
        yield
    finally:
        owner.weight_quantizer, layer.input_quantizer = before
