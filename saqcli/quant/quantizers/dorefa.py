"""DoReFa and PACT: weights squeezed by tanh, inputs clipped.

Weights of both are squeezed by tanh, then rounded on a range that is not trained:

    t(w)   = tanh(w) / max|tanh(w)|                                   in [-1, 1]
    Q(w)   = a * round(t(w))  on the grid of level 1                  on odd codes: 2 * quantize(t / 2 + 1 / 2) - 1
    dL/dw  = G * a * (1 - tanh(w)**2) / max|tanh(w)|                  straight through the rounding

Inputs of DoReFa are clamped to a range that is not trained:

    Q(x)   = a * round(clamp(x / a, 0, 1) * (2**bits - 1)) / (2**bits - 1)       a fixed
    dL/dx  = G * inside

Inputs of PACT are clamped to a level whose gradient comes from clipped values only:

    Q(x)   = a * round(clamp(x, 0, a) / a * n) / n                n = 2**bits - 1
    dL/dx  = G * inside
    dL/da  = sum G * above                                        0 inside: straight through the rounding

The level of ``clip``, in comparison, also gets the rounding residual inside. Signed inputs have the signed grid, from
``a * lowest / highest``, and ``dL/da = sum G * (above + below * lowest / highest)``.

Source: Zhou et al., arXiv:1606.06160, Eq. 5, 9 and 11 (DoReFa); Choi et al., arXiv:1805.06085, Eq. 1-3 and section 3
(PACT, whose weights are DoReFa's). Differs from the papers, in weights:

- The paper's factor ``a`` is 1, and its networks are trained from scratch. Here ``a`` is fitted by least squares at
  calibration and kept, so that the function of a pretrained network survives.
- The maximum is held constant in the gradient; the paper's formula would add a sum over the whole tensor to its one
  largest element.
- The maximum is over the weights that share a level: those of an output channel with granularity ``channel``.
- The grid is that of the scheme; ``auto`` is the SAQ paper's up to 7 bits and int8 at 8.

In inputs of DoReFa:

- The paper's range is 1, after an activation bounded by 1. Here it is fitted at calibration by least squares, since a
  pretrained network has no such bound.
- Signed inputs use the signed grid.
- Gradients are not quantized.

In inputs of PACT:

- Levels start at the least squared error on calibration images; the paper starts high and lets weight decay on the
  level reduce it (``training.decay_clips``).
- The paper's inputs are never signed.
"""

from typing import Any

import torch
from torch import Tensor

from saqcli.quant.clip_init import FIXED_POINT_STEPS, SQUARED, least_level, reduce_to, refined_step
from saqcli.quant.grid import TINY, AnyGrid, Grid, between, codes_of, fake_quantize, full_precision, step_of
from saqcli.quant.kernels.choice import KernelKind, backward_kernels_for, kernels_for
from saqcli.quant.kernels.layout import OVER, PACT, UNDER
from saqcli.quant.quantizers.base import LevelQuantizer, Quantizer


class FixedLevel(LevelQuantizer):
    """Rounds on a range that is fitted at calibration and not trained."""

    trained = False

    def forward(self, x: Tensor) -> Tensor:
        """``x`` clamped to the level and rounded onto the grid."""
        return fake_quantize(x, self.level(), self.grid(), self.kernel)


class TanhWeight(LevelQuantizer):
    """Weights; ``clipping_level`` is the factor ``a``, the value of the highest code."""

    trained = False

    def forward(self, x: Tensor) -> Tensor:
        """``a`` times the squeezed weight on the grid of level 1."""
        squeezed = _squeezed(full_precision(x), self.shape)
        with torch.no_grad():
            quantized = _codes(squeezed, self.grid()).mul_(self.step())
        return _StraightThrough.apply(squeezed * self.level(), quantized)  # type: ignore[no-any-return]

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The codes of ``x``; they do not depend on ``a``."""
        return _codes(_squeezed(x.detach().float(), self.shape), self.grid()).to(torch.int32)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Fit the factor of every candidate by least squares: <x, q> / <q, q> with the codes q.

        With another ``error_power``, reweighted least squares follow, kept where they lower the error.
        """
        x = x.detach().float()
        squeezed, largest = _squeezed(x, self.shape), float(x.abs().max())
        for row, grid in zip(self.clipping_level, self.grids.values(), strict=True):
            codes = _codes(squeezed, grid)
            power = reduce_to(codes * codes, self.shape, "sum").clamp_min(TINY)
            level = reduce_to(x * codes, self.shape, "sum") / power * grid.highest
            row.copy_(level.clamp_min(least_level(largest, grid)))
            if self.error_power != SQUARED:
                row.copy_(_refined(x, codes, row / grid.highest, self.shape, self.error_power) * grid.highest)

    @torch.no_grad()
    def fold(self, weight: Tensor) -> tuple[Quantizer, Tensor]:
        """``FixedLevel`` with the same levels, and the quantized weight, which it does not change."""
        plain = FixedLevel(self.grids, self.shape).to(self.clipping_level)
        plain.clipping_level.copy_(self.clipping_level)
        plain.select(self.bits)
        plain.step_bits = self.step_bits
        return plain, self(weight)


class _StraightThrough(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _squeezed(w: Tensor, shape: tuple[int, ...]) -> Tensor:
    """tanh(w) divided by its largest magnitude among the weights that share a level, in [-1, 1]."""
    squeezed = torch.tanh(w)
    return squeezed / reduce_to(squeezed.detach().abs(), shape, "amax").clamp_min(TINY)


def _codes(squeezed: Tensor, grid: AnyGrid) -> Tensor:
    return codes_of(squeezed, step_of(squeezed.new_ones(()), grid), grid)


def _refined(x: Tensor, codes: Tensor, step: Tensor, shape: tuple[int, ...], power: float) -> Tensor:
    """The step of least sum |x - step * code|**power, from one that is good at 2."""

    def error(step: Tensor) -> Tensor:
        return reduce_to((x - codes * step).abs_().pow_(power), shape, "sum")

    least = error(step)
    for _ in range(FIXED_POINT_STEPS):
        proposal = refined_step(x, codes, step, shape, power)
        found = error(proposal)
        improves = (found < least) & (proposal > 0)
        step, least = torch.where(improves, proposal, step), torch.where(improves, found, least)
    return step


class DorefaWeight(TanhWeight):
    """Weights: one factor per output channel or per tensor."""


class DorefaActivation(FixedLevel):
    """Inputs of a layer: one level."""


class PactWeight(TanhWeight):
    """Weights: one factor per output channel or per tensor."""


class PactActivation(LevelQuantizer):
    """Inputs of a layer: one trained level."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` clamped to the level and rounded onto the grid."""
        level = self.level().abs().clamp_min(TINY)
        return _Pact.apply(full_precision(x), level, self.grid(), self.kernel)  # type: ignore[no-any-return]


class _Pact(torch.autograd.Function):
    """Q(x) and the gradients in the module's docstring; ``level`` is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, level: Tensor, grid: AnyGrid, kind: KernelKind) -> Tensor:
        ctx.save_for_backward(x, level)
        ctx.grid, ctx.kind = grid, kind if isinstance(grid, Grid) else "eager"
        if isinstance(grid, Grid) and (kernels := kernels_for(kind, x, level)):
            ctx.requantize = lambda x, level: _Pact.apply(x, level, grid, kind)
            return kernels.forward(x, level, codes=grid)
        step = step_of(level, grid)
        return codes_of(x, step, grid).mul_(step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        x, level = ctx.saved_tensors
        lowest = ctx.grid.lowest / ctx.grid.highest  # in units of the level
        if kernels := backward_kernels_for(ctx.kind, x, level):
            grad_x, sums = kernels.backward(grad, x, level, codes=ctx.grid, kind=PACT)
            return grad_x, sums[OVER] + sums[UNDER] * lowest, None, None
        low = level * lowest
        grad_level = (grad * (x >= level)).sum() + (grad * (x < low)).sum() * lowest
        return grad * between(x.detach(), low, level), grad_level, None, None
