"""SAQ: perturb the quantized weights towards higher loss, then descend from there.

    pass 1    g = dL/dQ(w), dL/db, ... at the quantized weights
    ascent    e = rho * normalize(g)                               see ``sharpness``
    pass 2    gradients of L(Q(w) + e) through the straight-through estimator; batch statistics frozen
    update    the base optimizer's step on the unperturbed weights

This is Case 3 of Liu et al. (arXiv:2111.12273, Eq. 10-11). Perturbing w before quantization instead (Case 2,
plain SAM) is mostly swallowed by the rounding. Pass 1 takes only the gradients it needs and accumulates
nothing, so chunks of a batch and data-parallel shards each ascend on their own data, as sharpness-aware
minimization prescribes.

Differs from the paper: batch-norm statistics are updated in pass 1 only, as is usual for SAM; the released
code updates them in both (``bn_second_pass="update"``).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from saqcli.algorithms.sharpness import PERTURBED, Kind, PerturbedSet, RadiusUnit
from saqcli.quant.layers import frozen_batch_stats

if TYPE_CHECKING:
    from saqcli.algorithms.minimizers import Chunk


class SAQ:
    """Descends on the loss at the perturbed quantized weights.

    Args:
        model: wrapped, quantizers installed.
        base: the optimizer that moves the weights.
        rho: perturbation radius.
        rho_unit: ``deviation`` (of each layer's weights) or ``absolute``.
        perturb: which tensors ascend.
        bn_second_pass: whether pass 2 updates the running statistics of batch norms.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        *,
        rho: float,
        rho_unit: RadiusUnit = "deviation",
        perturb: Sequence[Kind] = PERTURBED,
        bn_second_pass: Literal["freeze", "update"] = "freeze",
    ) -> None:
        self.model = model
        self.base = base
        self.rho = rho
        self.rho_unit: RadiusUnit = rho_unit
        self.freeze = bn_second_pass == "freeze"
        self.set = PerturbedSet(model, perturb)

    def step(self, chunks: Sequence["Chunk"]) -> Tensor:
        """One update; every chunk is perturbed by its own gradient."""
        self.base.zero_grad()
        losses = []
        for chunk in chunks:
            loss, gradients = self.set.gradients(chunk.loss)
            perturbation = self.set.ascent(gradients, self.rho, self.rho_unit)
            stats = frozen_batch_stats(self.model) if self.freeze else nullcontext()
            with self.set.applied(perturbation), stats:
                (chunk.loss() * chunk.share).backward()  # type: ignore[no-untyped-call]
            losses.append(loss * chunk.share)
        self.base.step()
        return torch.stack(losses).sum()
