"""What SAMQ's controller is to make small: the loss at the perturbed point, and how far the budget is missed.

    R(b) = L(Q(w, b) + e) - L(Q(w, r)) + cost_weight * (c(b) / C - 1)**2          r a reference configuration

See ``samq``. A cost is a plain number: nothing is differentiated through it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.algorithms.searchers.supernet import Supernet
from saqcli.algorithms.sharpness import PerturbedSet, RadiusUnit
from saqcli.quant.cost import USE_MIDDLE


class SharpCost:
    """R of a configuration on a batch.

    Args:
        supernet: in eval mode whenever it is asked.
        perturbed: the tensors that ascend, those of every searched layer among them.
        rho: radius; 0 for the loss at the quantized weights themselves.
        rho_unit: of it.
        cost_weight: of the penalty.
        reference: a choice whose loss on the same images is subtracted; None for nothing.
    """

    def __init__(
        self,
        supernet: Supernet,
        perturbed: PerturbedSet,
        *,
        rho: float,
        rho_unit: RadiusUnit,
        cost_weight: float,
        reference: Sequence[int] | None,
    ) -> None:
        self.supernet, self.perturbed, self.reference = supernet, perturbed, reference
        self.rho, self.cost_weight = rho, cost_weight
        self.rho_unit: RadiusUnit = rho_unit

    def __call__(self, choice: Sequence[int], images: Tensor, labels: Tensor) -> float:
        """R of ``choice`` on images (N, C, H, W) and labels (N,)."""
        problem = self.supernet.problem
        loss = BatchLoss(self.supernet.model, images.to(problem.device), labels.to(problem.device))
        there = 0.0
        if self.reference is not None:
            self.supernet.select(self.reference)
            with torch.no_grad():
                there = float(loss())
        self.supernet.select(choice)
        return self.losses(loss)[1] - there + self.penalty(choice)

    def penalty(self, choice: Sequence[int]) -> float:
        """How far ``choice`` misses the middle of the window, squared and weighed."""
        problem = self.supernet.problem
        cost = problem.space.cost(choice)
        used = max(cost[index] / bound for index, bound in problem.budget.bounds())
        return self.cost_weight * (used / USE_MIDDLE - 1) ** 2

    def losses(self, loss: "BatchLoss") -> tuple[float, float]:
        """The loss at the selected bits, and at the perturbed point; the same where the radius is 0."""
        if not self.rho:
            with torch.no_grad():
                value = float(loss())
            return value, value
        value_there, gradients = self.perturbed.gradients(loss)
        ascent = self.perturbed.ascent(gradients, self.rho, self.rho_unit)
        with self.perturbed.applied(ascent), torch.no_grad():
            return float(value_there), float(loss())

    def sharpness(self, choice: Sequence[int]) -> float:
        """Mean rise of the loss to the perturbed point, over the scoring images."""
        problem = self.supernet.problem
        self.supernet.select(choice)
        model = self.supernet.model.eval()
        rises = []
        for images, labels in problem.images.scoring:
            value, sharp = self.losses(BatchLoss(model, images.to(problem.device), labels.to(problem.device)))
            rises.append(sharp - value)
        return sum(rises) / len(rises)


class BatchLoss:
    """Mean cross-entropy of a model on a batch, as minimizers ask for it."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.model, self.images, self.labels = model, images, labels

    def __call__(self, *, ascent: bool = False) -> Tensor:
        """The loss; all images take part in the ascent."""
        return F.cross_entropy(self.model(self.images).float(), self.labels)
