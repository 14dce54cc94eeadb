"""MSAM: sharpness-aware at the price of plain training, since the ascent follows past gradients and needs no pass.

    m <- beta m + g                              g: the gradient of the step, before clipping
    e_p = rho * T_p**2 m_p / ||T m||             m of a quantized weight is that of its float weight

Source: Becker et al., arXiv:2401.12033, which perturbs all weights; T and the perturbed set are those of SAQ.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.errors import ConfigError
from saqcli.training.minimizers import reference
from saqcli.training.minimizers.base import Ascent, Chunk, Passes
from saqcli.training.minimizers.sharpness_aware import SharpnessAware
from saqcli.training.options import plain_number
from saqcli.training.perturbation import Kind, RadiusUnit


class MSAM(SharpnessAware):
    """Perturbs quantized weights along the momentum of their gradients: one pass a step.

    The first step is plain. The loss of a step is that at the perturbed point, and the running statistics of norms are
    those of this only pass.

    Args:
        model: as in ``SharpnessAware``.
        base: as in ``SharpnessAware``.
        rho: as in ``SharpnessAware``.
        rho_unit: as in ``SharpnessAware``.
        perturb: as in ``SharpnessAware``.
        start: as in ``SharpnessAware``.
        beta: decay of the sum of gradients, 0 to below 1.

    Raises:
        ConfigError: ``beta`` is out of range, or as in ``SharpnessAware``.
    """

    one_pass = True
    description = "perturbs quantized weights along the momentum, at the price of one pass"
    reference = staticmethod(reference.msam)

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        *,
        rho: float | None = None,
        rho_unit: RadiusUnit = "deviation",
        perturb: Sequence[Kind] | None = None,
        start: int = 0,
        beta: float = 0.9,
    ) -> None:
        beta = plain_number("beta", beta, least=0)
        if beta >= 1:
            raise ConfigError(f"beta {beta:g} is not possible: give a number from 0 to below 1")
        super().__init__(
            model, base, rho=rho, rho_unit=rho_unit, perturb=perturb, bn_second_pass="update", start=start
        )
        self.beta = beta
        self._sums: list[Tensor] = []  # one per trained parameter; empty before the first step

    def ascend(self, chunk: Chunk) -> Ascent | None:
        """The point along the momentum, the same for all chunks; None before there is any."""
        if not (self._sums and self.ascends):
            return None
        known = {id(p): each for p, each in zip(self.trained, self._sums, strict=True)}
        moved = [*(layer.latent_weight() for layer in self.set.layers), *self.set.parameters]
        tied = [bool(layer.tied_to) for layer in self.set.layers] + [False] * len(self.set.parameters)
        along = [None if twice else known.get(id(p)) for p, twice in zip(moved, tied, strict=True)]
        if all(direction is None for direction in along):  # the base optimizer updates nothing of it
            return None
        count = len(self.set.layers)
        along = [*self.set.at_quantized(along[:count]), *along[count:]]
        perturbation = self.set.ascent(along, self.rho, self.rho_unit)
        return Ascent(None, self._at(perturbation), [perturbation.norm])

    def descend(self, passes: Passes) -> None:
        """Adds the gradients to the momentum."""
        with torch.no_grad():
            if not self._sums:
                self._sums = [torch.zeros_like(p) for p in self.trained]
            for p, total in zip(self.trained, self._sums, strict=True):
                total.mul_(self.beta)
                if p.grad is not None:
                    total.add_(p.grad)
        super().descend(passes)

    def state_dict(self) -> dict[str, Any]:
        """The momentum, and the number of steps."""
        return super().state_dict() | {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        super().load_state_dict(state)
        self._sums = [total.to(p.device) for total, p in zip(state["sums"], self.trained, strict=False)]
