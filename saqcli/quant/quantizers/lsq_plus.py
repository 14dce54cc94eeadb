"""LSQ+: activations on a range of their own, from below zero to above it, for GELU, SiLU and the like.

A signed grid gives half of its codes to negative numbers, though GELU never falls below -0.17. Here step s and
offset o are learned, and the codes run from ``lowest`` to ``lowest + top``, ``top = 2**bits - 1``:

    lowest = clamp(round(o / s), -top, 0)               so that 0 is always a code
    Q(x)   = s * clamp(round(x / s), lowest, lowest + top)

    dL/dx  = G * inside
    dL/ds  = g * sum G * [ inside * (round(x / s) - x / s) + above * top ]
    dL/do  = g * sum G * [ below + above ]
    g      = 1 / sqrt(N * top)                          N features of one image

Where ``round(o / s)`` is clamped, the ends are fixed codes: dL/ds gets ``below * lowest + above * (lowest + top)``
from them, and dL/do is zero unless a step of descent would bring o back.

Weights are LSQ's. Source: Bhalgat et al., arXiv:2004.09576, Eq. 4-8. Differs from the paper:

- The offset takes effect rounded to a multiple of the step and never above zero. Zero, and so the padding of a
  convolution, stays exact, and the offset is the integer zero point of ONNX.
- Step and offset start where a search finds the least squared error on calibration images; the paper minimises
  the same error by gradient descent.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.quant.fake_quantize import TINY, between
from saqcli.quant.grids import Grid
from saqcli.quant.quantizers.base import Quantizer, full_precision
from saqcli.quant.quantizers.learned_step import LearnedStep, features, scale_gradient
from saqcli.quant.quantizers.offset_search import best_range


class LsqPlusWeight(LearnedStep):
    """Weights: a step per output channel or one for the tensor."""


class LsqPlusActivation(Quantizer):
    """Inputs of a layer: one step, one offset.

    Attributes:
        step_size: trainable, ``(len(candidates),)``, in units of the tensor; its sign does not matter.
        offset: trainable, ``(len(candidates),)``: the value of the lowest code, before it is rounded to a code.
    """

    def __init__(self, grids: Mapping[int, Grid], shape: tuple[int, ...] = ()) -> None:
        """``grids`` by bit-width: their number of codes, and where the codes begin before anything is fitted."""
        super().__init__(grids, shape)
        steps = torch.tensor([1 / grid.highest for grid in self.grids.values()])
        lowest = torch.tensor([float(grid.lowest) for grid in self.grids.values()])
        self.step_size = nn.Parameter(steps)
        self.offset = nn.Parameter(steps * lowest)

    @property
    def top(self) -> int:
        """The highest code, counted from the lowest."""
        return self.grids[self.bits].levels - 1

    def step(self) -> Tensor:
        """The active step, differentiable."""
        return self.step_size[self._active].abs().clamp_min(TINY)

    def grid(self) -> Grid:
        """The active codes, as step and offset put them."""
        lowest = int(_lowest(self.step(), self.offset[self._active], self.top))
        return Grid(lowest, lowest + self.top, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` clamped to the learned range and rounded."""
        x = full_precision(x)
        step = scale_gradient(self.step(), features(x), self.top)
        offset = scale_gradient(self.offset[self._active], features(x), self.top)
        return _Asymmetric.apply(x, step, offset, self.top)  # type: ignore[no-any-return]

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Step and offset of least squared error on ``x``, for every candidate."""
        for k, grid in enumerate(self.grids.values()):
            step, lowest = best_range(x.detach().float(), grid.levels - 1)
            self.step_size[k], self.offset[k] = step, lowest * step


def _lowest(step: Tensor, offset: Tensor, top: int) -> Tensor:
    return (offset / step).round().clamp(-top, 0)


class _Asymmetric(torch.autograd.Function):
    """Q(x) and the gradients of the module's docstring, without g; ``step`` is positive, both are scalars."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor, top: int) -> Tensor:
        lowest = _lowest(step, offset, top)
        quantized = (x / step).round_().clamp_(lowest, lowest + top).mul_(step)
        ctx.save_for_backward(x, quantized, step, offset)
        ctx.top = top
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        x, quantized, step, offset = ctx.saved_tensors
        top: int = ctx.top
        lowest = _lowest(step, offset, top)
        wanted = (offset / step).round()
        low, high = step * lowest, step * (lowest + top)
        below, above, inside = x < low, x > high, between(x.detach(), low, high)
        under, over = (grad * below).sum(), (grad * above).sum()
        ends = torch.where(wanted == lowest, over * top, under * lowest + over * (lowest + top))
        grad_step = (grad * inside * (quantized - x)).sum() / step + ends
        outside = under + over
        # Descent moves against the gradient: out of reach above zero it must be positive to bring the offset back.
        stuck = ((wanted > 0) & (outside < 0)) | ((wanted < -top) & (outside > 0))
        return grad * inside, grad_step, torch.where(stuck, 0, outside), None
