"""Sharpness: the increase of the loss within a radius, L(Q(w) + e) - L(Q(w)).

e is the steepest ascent of norm rho; ``training.perturbation`` computes it. The gradient is that of the mean loss over
*all* images before the single step, so that the result does not depend on the batches. Only the quantized weights are
perturbed.

Source: the sharpness of Liu et al. (arXiv:2111.12273, Eq. 10-11).
"""

import math

import torch

from saqcli.analysis.base import AnalysisInput, Reading, Session, Settings, dot, finite_or_none
from saqcli.training.perturbation import PerturbedSet


class SharpnessReading(Reading):
    """Loss before and after the ascent.

    Attributes:
        rho: radius.
        rho_unit: deviations of each layer's weights, or absolute.
        loss: at the quantized weights.
        perturbed_loss: at the perturbed weights; None if it is NaN or infinite.
        sharpness: perturbed loss minus loss.
        top1: percent, at the quantized weights.
        perturbed_top1: percent, at the perturbed weights.
        gradient_norm: joint L2 norm of the gradients, each times its layer's deviation if that is the unit.
        relative_norm: L2 norm of the perturbation divided by that of the quantized weights.
    """

    rho: float
    rho_unit: str
    loss: float
    perturbed_loss: float | None
    sharpness: float | None
    top1: float
    perturbed_top1: float
    gradient_norm: float
    relative_norm: float


def measure_sharpness(analyzed: AnalysisInput, settings: Settings, session: Session) -> SharpnessReading:
    """One ascent step of radius ``settings.rho`` over all images.

    Raises:
        UnperturbedLayer: no quantized layer influences the loss.
    """
    perturbed_set = PerturbedSet(analyzed.model, ("weights",))
    gradients = analyzed.gradients(perturbed_set, "sharpness", session)
    perturbation = perturbed_set.ascent(gradients, settings.rho, settings.rho_unit)
    before = analyzed.score()
    with perturbed_set.applied(perturbation):
        after = analyzed.score()
    with torch.no_grad():
        moved = perturbation.weights
        weights = [layer.quantized_weight().detach() for layer in perturbed_set.layers]
    return SharpnessReading(
        rho=settings.rho,
        rho_unit=settings.rho_unit,
        loss=before.loss,
        perturbed_loss=finite_or_none(after.loss),
        sharpness=finite_or_none(after.loss - before.loss),
        top1=before.top1,
        perturbed_top1=after.top1,
        gradient_norm=float(perturbation.norm),
        relative_norm=math.sqrt(dot(moved, moved)) / math.sqrt(dot(weights, weights)),
    )
