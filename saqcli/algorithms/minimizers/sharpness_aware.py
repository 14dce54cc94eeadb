"""What all sharpness-aware minimizers do, whatever they perturb and by which gradient.

    pass 1    gradients at the quantized weights; they accumulate nowhere
    ascent    the perturbation of radius rho that raises the loss most         see ``sharpness``
    pass 2    gradients at the perturbed point, through the straight-through estimator; batch statistics frozen
    update    the base optimizer's step on the unperturbed weights

Chunks of a batch and data-parallel shards each ascend on their own data, as sharpness-aware minimization prescribes
(Foret et al., arXiv:2010.01412, section 4.1: m-sharpness).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from saqcli.algorithms.divergence import check_step
from saqcli.algorithms.sharpness import PERTURBED, Adaptive, Kind, PerturbedSet, RadiusUnit
from saqcli.errors import ConfigError
from saqcli.quant.layers import frozen_batch_stats

if TYPE_CHECKING:
    from saqcli.algorithms.minimizers import Chunk


class SharpnessAware:
    """Descends on the loss at a perturbed point.

    Args:
        model: wrapped, quantizers installed.
        base: the optimizer that moves the weights.
        rho: perturbation radius.
        rho_unit: ``deviation`` (of each layer's weights) or ``absolute``.
        perturb: which tensors ascend; None for what the method is known for.
        bn_second_pass: whether pass 2 updates the running statistics of batch norms.

    Raises:
        ConfigError: a word that is not among an option's choices.
    """

    perturbed_kinds: ClassVar[tuple[Kind, ...]] = PERTURBED
    through_rounding: ClassVar[bool] = False
    adaptive: Adaptive | None = None

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        *,
        rho: float,
        rho_unit: RadiusUnit = "deviation",
        perturb: Sequence[Kind] | None = None,
        bn_second_pass: Literal["freeze", "update"] = "freeze",
    ) -> None:
        self.model = model
        self.base = base
        self.rho = rho
        self.rho_unit: RadiusUnit = rho_unit
        _check("bn_second_pass", bn_second_pass, ("freeze", "update"))
        _check("rho_unit", rho_unit, get_args(RadiusUnit))
        for kind in perturb or ():
            _check("perturb", kind, get_args(Kind))
        self.freeze = bn_second_pass == "freeze"
        self.set = PerturbedSet(model, self.perturbed_kinds if perturb is None else perturb)

    def step(self, chunks: Sequence["Chunk"]) -> Tensor:
        """One update; every chunk is perturbed by its own gradient."""
        self.base.zero_grad()
        losses, norms = [], []
        for chunk in chunks:
            loss, gradients = self.set.gradients(chunk.loss, through_rounding=self.through_rounding)
            perturbation = self.set.ascent(gradients, self.rho, self.rho_unit, self.adaptive)
            norms.append(perturbation.norm)
            stats = frozen_batch_stats(self.model) if self.freeze else nullcontext()
            with self.set.applied(perturbation), stats:
                perturbed_loss = chunk.loss() * chunk.share
                perturbed_loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss * chunk.share)
            norms.append(perturbed_loss.detach())
        total = torch.stack(losses).sum()
        check_step(total, *norms)
        self.base.step()
        return total


def _check(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{option} {value!r} is not known: choose from {', '.join(choices)}")
