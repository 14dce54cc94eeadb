"""Loss and accuracy of the model with one layer at other bits.

Weights and inputs of the layer get newly fitted quantizers at the candidate's bits, as in calibration; all other
layers are unchanged. Changes are relative to the unchanged model, also at the layer's own bits, where fitted levels
replace the trained ones.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from saqcli.analysis.base import Reading, Session, Settings, Subject, finite, observe_inputs
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


def measure_sensitivity(subject: Subject, settings: Settings, session: Session) -> SensitivityReading:
    """Evaluate the model once for every layer and candidate."""
    candidates = sorted(set(settings.candidates))
    base = subject.score()
    rows = []
    steps = len(subject.batches) + len(subject.layers) * len(candidates)
    with session.progress.task("sensitivity", steps) as task:
        statistics = observe_inputs(subject, settings.seed, task)
        for name, layer in subject.layers.items():
            row = []
            for bits in candidates:
                with at_bits(subject, layer, bits, statistics[name]):
                    score = subject.score()
                row.append(
                    Candidate(
                        bits=bits,
                        loss=finite(score.loss),
                        top1=score.top1,
                        loss_change=finite(score.loss - base.loss),
                        top1_change=score.top1 - base.top1,
                    )
                )
                task.advance(images=subject.images, loss=score.loss, top1=score.top1)
            now = layer.bits
            rows.append(
                LayerSensitivity(
                    name=name, weight_bits=now.weight, activation_bits=now.activation, candidates=row
                )
            )
    return SensitivityReading(loss=base.loss, top1=base.top1, layers=rows)


@contextmanager
def at_bits(
    subject: Subject, layer: QuantizedLayer, bits: int, statistics: InputStatistics
) -> Iterator[None]:
    """Within the context ``layer`` has fitted quantizers at ``bits``; its own are restored afterwards, bit for bit."""
    owner = layer.tied_to[0] if layer.tied_to else layer  # the layer that quantizes the weight
    before: tuple[nn.Module, nn.Module] = owner.weight_quantizer, layer.input_quantizer
    own = before[1]
    signed = own.grid().lowest < 0 if isinstance(own, Quantizer) else statistics.signed
    like = layer.latent_weight()
    weight = subject.scheme.weight_quantizer(layer, [bits]).to(like)
    inputs = subject.scheme.input_quantizer(layer, [bits], signed=signed).to(like)
    weight.fit(layer.effective_weight().detach())
    inputs.fit(statistics.samples.to(like))
    try:
        owner.weight_quantizer, layer.input_quantizer = weight.eval(), inputs.eval()
        yield
    finally:
        owner.weight_quantizer, layer.input_quantizer = before
