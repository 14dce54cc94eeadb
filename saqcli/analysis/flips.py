"""The share of weights whose code changes when the *latent* weights are perturbed.

This is Case 2 of sharpness-aware quantization:

    e = rho * normalize(dL/dw at Q(w)),   flipped where code(w + e) differs from code(w)

Rounding removes a perturbation that does not move a weight across a code boundary, and turns one that does into a
whole step: few weights flip, and the quantized weights move much further than rho.

Source: Cases 1 to 3 of Liu et al. (arXiv:2111.12273). A weight at a uniformly random position within its code flips
with probability |e| / gap, so the expected share is about the mean of that.
"""

import torch
from torch import Tensor

from saqcli.analysis.base import AnalysisInput, Reading, Session, Settings
from saqcli.quant.quantizers import Quantizer
from saqcli.training.perturbation import PerturbedSet


class LayerFlips(Reading):
    """The effect of the perturbation on one layer.

    Attributes:
        name: of the layer.
        weights: number of weights.
        bits: of its weights.
        flipped: number of weights whose code changes.
        share: flipped divided by weights, 0 to 1.
        relative_size: mean of |e| divided by the gap between neighboring levels, the mean gap of a table.
        norm_ratio: ||Q(w + e) - Q(w)|| / ||e||; 0 if nothing is perturbed.
    """

    name: str
    weights: int
    bits: int
    flipped: int
    share: float
    relative_size: float
    norm_ratio: float


class FlipsReading(Reading):
    """Flips of all layers with quantized weights.

    Attributes:
        reason: why nothing was measured; None otherwise.
        rho: radius.
        rho_unit: deviations of each layer's weights, or absolute.
        layers: in execution order.
        weights: total number of weights.
        flipped: total number of flips.
        share: flipped divided by weights, 0 to 1.
        relative_size: as for a layer, over all weights.
        norm_ratio: as for a layer, over all weights.
    """

    reason: str | None
    rho: float
    rho_unit: str
    layers: tuple[LayerFlips, ...] = ()
    weights: int = 0
    flipped: int = 0
    share: float = 0.0
    relative_size: float = 0.0
    norm_ratio: float = 0.0


def measure_flips(analyzed: AnalysisInput, settings: Settings, session: Session) -> FlipsReading:
    """One ascent step of the latent weights over all images, by the straight-through gradient."""
    if not analyzed.latent:
        reason = "the latent weights are not available: they are in the checkpoint of a run directory"
        return FlipsReading(reason=reason, rho=settings.rho, rho_unit=settings.rho_unit)
    perturbed_set = PerturbedSet(analyzed.model, ("latent_weights",))
    gradients = analyzed.gradients(perturbed_set, "flips", session)
    perturbation = perturbed_set.ascent(gradients, settings.rho, settings.rho_unit)
    quantized = {
        name: (layer, layer.weight_quantizer)
        for name, layer in analyzed.layers.items()
        if isinstance(layer.weight_quantizer, Quantizer)
    }
    with torch.no_grad():
        before = {name: layer.effective_weight().clone() for name, (layer, _) in quantized.items()}
        with perturbed_set.applied(perturbation):
            after = {name: layer.effective_weight().clone() for name, (layer, _) in quantized.items()}
        parts = {name: _LayerSums(q, before[name], after[name]) for name, (_, q) in quantized.items()}
    total = [sum(column) for column in zip(*(part.sums for part in parts.values()), strict=True)]
    weights, flipped, size, moved, perturbed = total or [0.0] * 5
    return FlipsReading(
        reason=None,
        rho=settings.rho,
        rho_unit=settings.rho_unit,
        layers=tuple(part.reading(name) for name, part in parts.items()),
        weights=int(weights),
        flipped=int(flipped),
        share=flipped / max(weights, 1),
        relative_size=size / max(weights, 1),
        norm_ratio=(moved / perturbed) ** 0.5 if perturbed else 0.0,
    )


class _LayerSums:
    """Sums over one layer: weights, flipped, |e| / gap, ||Q(w + e) - Q(w)||^2, ||e||^2."""

    def __init__(self, quantizer: Quantizer, before: Tensor, after: Tensor) -> None:
        self.bits = quantizer.bits
        step = quantizer.fold(before)[0].step()
        codes = quantizer.codes(before), quantizer.codes(after)
        e = (after - before).double()
        dropped = quantizer.dropped_deviation(before)
        e = e if dropped is None else e / dropped  # in units of the step
        moved = ((codes[1] - codes[0]) * step).double()
        gap = step.abs() * quantizer.grid().gap
        self.sums = (
            float(before.numel()),
            float((codes[0] != codes[1]).sum()),
            float((e.abs() / gap).sum()),
            float(moved.square().sum()),
            float(e.square().sum()),
        )

    def reading(self, name: str) -> LayerFlips:
        """The reading of the layer."""
        weights, flipped, size, moved, perturbed = self.sums
        return LayerFlips(
            name=name,
            weights=int(weights),
            bits=self.bits,
            flipped=int(flipped),
            share=flipped / weights,
            relative_size=size / weights,
            norm_ratio=(moved / perturbed) ** 0.5 if perturbed else 0.0,
        )
