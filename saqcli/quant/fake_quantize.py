"""The one numerical kernel: rounding onto a grid, with the gradients of Liu et al. (arXiv:2111.12273, section
3).

    step  = |level| / highest
    code  = clamp(round(x / step), lowest, highest)               stride 1
    code  = 2 * clamp(round((x / step + n) / 2), 0, n) - n         stride 2, n = highest
    Q(x)  = code * step

With upstream gradient G and ``inside`` = 1 where x / step lies in [lowest, highest]:

    dL/dx     = G * inside                                         straight through the rounding
    dL/dlevel = sum G * (Q(x) - inside * x) / level                the rounding residual inside, +-1 outside

for the paper's grids these are its Eq. 6-8. The division ``x / step`` (not a multiplication by 1 / step) and
the final product are what ONNX Runtime's QuantizeLinear and DequantizeLinear compute, bit for bit.
"""

from typing import Any

import torch
from torch import Tensor

from saqcli.quant.grids import Grid

TINY = 1e-12  # least clipping level, guards 0 / 0; initial levels of empty channels are set far above it


def step_of(level: Tensor, grid: Grid) -> Tensor:
    """The distance unit of the grid, in units of the tensor; shape of ``level``."""
    return level.abs().clamp_min(TINY) / grid.highest


def codes_of(x: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """The integers, in the dtype and shape of ``x``, that stand for ``x``; rounding is half to even."""
    if grid.stride == 1:
        return (x / step).round_().clamp_(grid.lowest, grid.highest)
    n = grid.highest
    return (x / step).add_(n).div_(2).round_().clamp_(0, n).mul_(2).sub_(n)


class FakeQuantize(torch.autograd.Function):
    """Q(x) and its straight-through gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, level: Tensor, grid: Grid) -> Tensor:
        """``x`` on the grid; ``level`` broadcasts against ``x``."""
        step = step_of(level, grid)
        quantized = codes_of(x, step, grid).mul_(step)
        ctx.save_for_backward(x, quantized, level)
        ctx.grid = grid
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients to ``x`` and to the clipping level, as in the module's docstring."""
        (grad,) = grads
        x, quantized, level = ctx.saved_tensors
        grid: Grid = ctx.grid
        bound = level.abs().clamp_min(TINY)
        inside = between(x.detach(), bound.detach() * (grid.lowest / grid.highest), bound.detach())
        grad_x = grad * inside if ctx.needs_input_grad[0] else None
        grad_level = None
        if ctx.needs_input_grad[1]:
            residual = quantized.addcmul(x, inside, value=-1).mul_(grad)
            grad_level = residual.sum_to_size(level.shape) / bound * torch.where(level < 0, -1, 1)
        return grad_x, grad_level, None


def between(x: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """1 where x lies in the closed range, else 0, in the dtype of x: on a CPU four times as fast as with booleans."""
    inside = torch.le(x, highest, out=torch.empty_like(x))
    return inside.mul_(torch.ge(x, lowest, out=torch.empty_like(x)))


def fake_quantize(x: Tensor, level: Tensor, grid: Grid) -> Tensor:
    """``x`` mapped onto the grid, differentiable in ``x`` and ``level``.

    Args:
        x: any shape; computed in float32 at least, whatever autocast does around it.
        level: clipping level, the value of the highest code; shape broadcasts against ``x``.
        grid: the codes.

    Example:
        >>> fake_quantize(torch.tensor([-0.2, 0.3, 0.9]), torch.tensor(0.75), Grid(0, 3, 1))
        tensor([0.0000, 0.2500, 0.7500])
    """
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    return FakeQuantize.apply(x, level, grid)  # type: ignore[no-any-return]
