"""What SAMQ's controller is to make small: the loss at the perturbed point, and how far the budget is missed.

    R(b) = L(Q(w, b) + e) - L(Q(w, r)) + cost_weight * (c(b) / C - 1)**2          r a reference configuration

See ``samq``. A cost is a plain number: nothing is differentiated through it.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from saqcli.algorithms.minimizers import Chunk
from saqcli.algorithms.minimizers.batches import gradients_of
from saqcli.algorithms.objective import micro_batches
from saqcli.algorithms.searchers.supernet import Supernet
from saqcli.algorithms.sharpness import PerturbedSet, RadiusUnit
from saqcli.algorithms.steps import Setbacks, fitting
from saqcli.quant.cost import USE_MIDDLE

T = TypeVar("T")


class SharpCost:
    """R of a configuration on a batch.

    Args:
        supernet: in eval mode whenever it is asked.
        perturbed: the tensors that ascend, those of every searched layer among them.
        rho: radius; 0 for the loss at the quantized weights themselves.
        rho_unit: of it.
        cost_weight: of the penalty.
        reference: a choice whose loss on the same images is subtracted; None for nothing.

    Attributes:
        setbacks: how many images go through the supernet at a time, where memory does not suffice for all.
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
        self.setbacks = Setbacks()

    def __call__(self, choice: Sequence[int], images: Tensor, labels: Tensor) -> float:
        """R of ``choice`` on images (N, C, H, W) and labels (N,)."""
        there = 0.0
        if self.reference is not None:
            self.supernet.select(self.reference)
            there = self.plainly(images, labels)
        self.supernet.select(choice)
        return self.losses(images, labels)[1] - there + self.penalty(choice)

    def penalty(self, choice: Sequence[int]) -> float:
        """How far ``choice`` misses the middle of the window, squared and weighed."""
        problem = self.supernet.problem
        cost = problem.space.cost(choice)
        used = max(cost[index] / bound for index, bound in problem.budget.bounds())
        return self.cost_weight * (used / USE_MIDDLE - 1) ** 2

    def losses(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """The loss at the selected bits, and at the perturbed point; the same where the radius is 0."""
        if not self.rho:
            value = self.plainly(images, labels)
            return value, value
        return self._fitting(self._losses, images, labels)

    def plainly(self, images: Tensor, labels: Tensor) -> float:
        """The loss at the selected bits."""
        return self._fitting(_mean, images, labels)

    def _losses(self, chunk: Chunk) -> tuple[float, float]:
        value, gradients = gradients_of(chunk, self.perturbed)
        ascent = self.perturbed.ascent(gradients, self.rho, self.rho_unit)
        with self.perturbed.applied(ascent):
            return float(value), _mean(chunk)

    def _fitting(self, passes: Callable[[Chunk], T], images: Tensor, labels: Tensor) -> T:
        """``passes`` over a batch, of as many images at a time as memory suffices for; in eval mode nothing changes."""
        problem, model = self.supernet.problem, self.supernet.model
        images, labels = images.to(problem.device), labels.to(problem.device)
        return fitting(
            lambda: passes(micro_batches(model, images, labels, self.setbacks.micro_batch)),
            lambda: self.setbacks.halve(len(labels), problem.progress.note),
        )

    def sharpness(self, choice: Sequence[int]) -> float:
        """Mean rise of the loss to the perturbed point, over the scoring images."""
        problem = self.supernet.problem
        self.supernet.select(choice)
        self.supernet.model.eval()
        rises = []
        for images, labels in problem.images.scoring:
            value, sharp = self.losses(images, labels)
            rises.append(sharp - value)
        return sum(rises) / len(rises)


@torch.no_grad()
def _mean(chunk: Chunk) -> float:
    return float(sum(loss() * share for loss, share in chunk))
