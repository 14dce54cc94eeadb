"""Between two ascents: go on with what the last one added to the gradient (LookSAM).

At a step with an ascent, g is the gradient at the weights and g_s the one at the perturbed point. What g_s
has beside g changes slowly, so it is kept and added, at its relative size, to the plain gradients until the
next ascent:

    g_v = g_s - (<g, g_s> / <g, g>) g                   the part of g_s that is orthogonal to g
    g + reuse * ||g|| / ||g_v|| * g_v                   at the steps in between

with norms over all trained parameters together. Source: Liu et al., arXiv:2203.02714, Algorithm 1, whose alpha
is ``reuse`` (0.7 there). Differs from the paper: norms are joint and not layer by layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saqcli import ranks

ROUNDING = 1e-5  # g_v below this fraction of g_s is what rounding left of equal gradients


class LookAhead:
    """Keeps the direction that the last ascent added.

    Args:
        parameters: all that are trained.
        reuse: length of what is added, relative to the plain gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reuse: float) -> None:
        self.parameters = list(parameters)
        self.reuse = reuse
        self._direction: list[Tensor] | None = None  # g_v / ||g_v||

    @torch.no_grad()
    def remember(self, plain: Sequence[Tensor]) -> None:
        """``plain`` is g of this rank, a tensor a parameter; g_s of all ranks stands in the parameters' ``grad``."""
        plain = [gradient.clone() for gradient in plain]
        ranks.average(plain)
        ascended = [_gradient(p) for p in self.parameters]
        ratio = _dot(plain, ascended) / _dot(plain, plain).clamp_min(torch.finfo(torch.float32).tiny)
        beside = [g_s - ratio * g for g_s, g in zip(ascended, plain, strict=True)]
        norm, whole = _dot(beside, beside).sqrt(), _dot(ascended, ascended).sqrt()
        scale = torch.where(norm > ROUNDING * whole, 1 / norm, torch.zeros_like(norm))
        self._direction = [g * scale for g in beside]

    @torch.no_grad()
    def add(self) -> None:
        """Add the kept direction to the gradients of a plain pass; nothing before the first ascent."""
        if self._direction is None:
            return
        plain = [_gradient(p) for p in self.parameters]
        length = self.reuse * _dot(plain, plain).sqrt()
        for parameter, direction in zip(self.parameters, self._direction, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(direction * length)

    def state_dict(self) -> dict[str, Any]:
        """The direction."""
        return {"direction": self._direction}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        kept = state["direction"]
        if kept is not None:
            kept = [value.to(p.device) for value, p in zip(kept, self.parameters, strict=True)]
        self._direction = kept


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Inner product over all tensors."""
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()
