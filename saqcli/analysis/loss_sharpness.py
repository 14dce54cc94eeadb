"""How much the loss rises within a radius: L(Q(w) + e) - L(Q(w)) at the steepest ascent e of norm rho.

The gradient is that of the mean loss over *all* images before the one step is taken, so that the result does
not depend on how the images are batched. Only the quantized weights are perturbed.

Source: the sharpness of Liu et al. (arXiv:2111.12273, Eq. 10-11); ``sharpness`` holds the ascent itself.
"""

import math

import torch

from saqcli.analysis.base import Reading, Session, Settings, Subject, finite
from saqcli.analysis.curvature import dot
from saqcli.training.perturbation import PerturbedSet


class SharpnessReading(Reading):
    """Loss before and after the ascent.

    Attributes:
        rho: radius.
        rho_unit: deviations of each layer's weights, or absolute.
        loss: at the quantized weights.
        perturbed_loss: at the perturbed ones; None where it is no finite number.
        sharpness: the difference.
        top1: percent, at the quantized weights.
        perturbed_top1: percent, at the perturbed ones.
        gradient_norm: joint L2 norm of the gradients, each times its layer's deviation where that is the unit.
        relative_norm: L2 norm of the perturbation over that of the quantized weights.
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


def measure_sharpness(subject: Subject, settings: Settings, session: Session) -> SharpnessReading:
    """One ascent of radius ``settings.rho`` over all images.

    Raises:
        UnperturbedLayer: not one quantized layer takes part in the loss.
    """
    perturbed_set = PerturbedSet(subject.model, ("weights",))
    gradients = subject.gradients(perturbed_set, "sharpness", session)
    perturbation = perturbed_set.ascent(gradients, settings.rho, settings.rho_unit)
    before = subject.score()
    with perturbed_set.applied(perturbation):
        after = subject.score()
    with torch.no_grad():
        moved = perturbation.weights
        weights = [layer.quantized_weight().detach() for layer in perturbed_set.layers]
    return SharpnessReading(
        rho=settings.rho,
        rho_unit=settings.rho_unit,
        loss=before.loss,
        perturbed_loss=finite(after.loss),
        sharpness=finite(after.loss - before.loss),
        top1=before.top1,
        perturbed_top1=after.top1,
        gradient_norm=float(perturbation.norm),
        relative_norm=math.sqrt(dot(moved, moved)) / math.sqrt(dot(weights, weights)),
    )
