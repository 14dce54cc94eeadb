"""GSAM: SAQ that also narrows the gap between the loss at the perturbed point and at the weights.

Zhuang et al., arXiv:2203.08065, Algorithm 1: with g at the weights and g_p at the perturbed point,

    g_p - alpha * (g - <g, g_p> / <g_p, g_p> g_p)

The second term is the part of g that is orthogonal to g_p, so the perturbed loss is descended as fast as before.
Differs from the paper: weights are perturbed after quantization, as in SAQ; the radius does not follow the schedule.
"""

from typing import Any

import torch
from torch import Tensor, nn

from saqcli.training.minimizers import Passes, SharpnessAware, orthogonal_part
from saqcli.training.minimizers.reference import Problem, ascended
from saqcli.training.options import check_number


def gsam(
    problem: Problem, state: dict[str, Any], *, alpha: float = 0.2, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step on plain tensors."""
    loss, shifts = ascended(problem, **options)
    _, plain = problem.gradients()
    _, perturbed = problem.gradients(shifts)
    g, g_p = (torch.cat([value.flatten() for value in each.values()]) for each in (plain, perturbed))
    along = (g @ g_p) / (g_p @ g_p)
    return loss, {name: value - alpha * (plain[name] - along * value) for name, value in perturbed.items()}


class GSAM(SharpnessAware):
    """SAQ with a narrower surrogate gap.

    Args:
        model: as in ``SharpnessAware``.
        base: as in ``SharpnessAware``.
        alpha: weight of the gap.
        options: further arguments of ``SharpnessAware``.
    """

    description = "perturbs quantized weights and narrows the surrogate gap"
    reference = staticmethod(gsam)
    wants_plain = True

    def __init__(
        self, model: nn.Module, base: torch.optim.Optimizer, *, alpha: float = 0.2, **options: Any
    ) -> None:
        super().__init__(model, base, **options)
        check_number("alpha", alpha, least=0)
        self.alpha = alpha

    @torch.no_grad()
    def descend(self, passes: Passes) -> None:
        """Subtract the part of the gradient at the weights that is orthogonal to that at the perturbed point."""
        if passes.ascended:
            perturbed = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
            for p, gap in zip(self.trained, orthogonal_part(passes.plain, perturbed), strict=True):
                if p.grad is not None:
                    p.grad.sub_(gap, alpha=self.alpha)
        super().descend(passes)
