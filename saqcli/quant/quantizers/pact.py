"""PACT: inputs are clamped to a level that is learned from what it cuts off alone.

    Q(x)   = a * round(clamp(x, 0, a) / a * n) / n                n = 2**bits - 1
    dL/dx  = G * inside
    dL/da  = sum G * above                                        0 inside: rounding passes straight through

Compare ``clip``, whose level also gets the rounding residual inside. Signed inputs have the signed grid, from
``a * lowest / highest``, and ``dL/da = sum G * (above + below * lowest / highest)``.

Weights are DoReFa's (``tanh_weight``), as in the paper. Source: Choi et al., arXiv:1805.06085, Eq. 1-3 and section
3. Differs from the paper, beside what ``tanh_weight`` says:

- Levels start at the least squared error on calibration images; the paper starts high and lets weight decay on the
  level bring it down (``training.decay_clips``).
- The paper's inputs are never signed.
"""

from typing import Any

import torch
from torch import Tensor

from saqcli.quant.fake_quantize import TINY, between, codes_of, step_of
from saqcli.quant.grids import Grid
from saqcli.quant.quantizers.base import LevelQuantizer, full_precision
from saqcli.quant.quantizers.tanh_weight import TanhWeight


class PactWeight(TanhWeight):
    """Weights: a factor per output channel or one for the tensor."""


class PactActivation(LevelQuantizer):
    """Inputs of a layer: one trained level."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` clamped to the level and rounded onto the grid."""
        level = self.level().abs().clamp_min(TINY)
        return _Pact.apply(full_precision(x), level, self.grid())  # type: ignore[no-any-return]


class _Pact(torch.autograd.Function):
    """Q(x) and the gradients of the module's docstring; ``level`` is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, level: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward(x, level)
        ctx.grid = grid
        step = step_of(level, grid)
        return codes_of(x, step, grid).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, level = ctx.saved_tensors
        lowest = ctx.grid.lowest / ctx.grid.highest  # in units of the level
        low = level * lowest
        grad_level = (grad * (x >= level)).sum() + (grad * (x < low)).sum() * lowest
        return grad * between(x.detach(), low, level), grad_level, None
