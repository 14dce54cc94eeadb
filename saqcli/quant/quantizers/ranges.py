"""Rounding onto a range of consecutive codes, with the gradients of its step and offset.

Codes run from ``lowest`` to ``lowest + top``; one step and one offset for the tensor, or one of both for each channel:

    lowest = clamp(round(o / s), -top, 0)               so that 0 is always a code
    Q(x)   = s * clamp(round(x / s), lowest, lowest + top)

    dL/dx  = G * inside
    dL/ds  = sum G * [ inside * (round(x / s) - x / s) + above * top ]
    dL/do  = sum G * [ below + above ]

Where ``round(o / s)`` is clamped, the ends are fixed codes: they add ``below * lowest + above * (lowest + top)`` to
dL/ds instead, and dL/do is zero unless a descent step would move o back. The quantizers that use it scale their
gradients (``scale_gradient``) as LSQ does.
"""

from typing import Any

import torch
from torch import Tensor

from saqcli.quant.grid import Grid, between
from saqcli.quant.kernels.choice import KernelKind, backward_kernels_for, kernels_for
from saqcli.quant.kernels.layout import OFFSET


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(parameter: Tensor, count: float, highest: float) -> Tensor:
    """``parameter`` with its gradient scaled by 1 / sqrt(count * highest); ``count`` values share an element of it."""
    return _ScaleGradient.apply(parameter, max(1.0, count * highest) ** -0.5)  # type: ignore[no-any-return]


def values_per_image(x: Tensor) -> float:
    """Number of values of ``x``, (N, ...), per image: the batch size must not change a gradient."""
    return x.numel() / max(1, len(x))


def round_to_range(x: Tensor, step: Tensor, offset: Tensor, top: int, kind: KernelKind = "eager") -> Tensor:
    """``x`` on the codes from that of ``offset``, differentiable in all three.

    Args:
        x: any shape, at least float32.
        step: positive; its shape broadcasts against ``x``.
        offset: value of the lowest code, before it is rounded to a code; in the shape of ``step``.
        top: the highest code, counted from the lowest.
        kind: which kernel.
    """
    return _RoundToRange.apply(x, step, offset, top, kind)  # type: ignore[no-any-return]


def lowest_code(step: Tensor, offset: Tensor, top: int) -> Tensor:
    """The lowest code of the range from ``offset``, 0 or below, such that 0 is a code."""
    return (offset / step).round().clamp(-top, 0)


class _RoundToRange(torch.autograd.Function):
    """Q(x) and the gradients in the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor, top: int, kind: KernelKind) -> Tensor:
        ctx.top, ctx.kind = top, kind
        if kernels := kernels_for(kind, x, step):
            ctx.save_for_backward(x, step, offset)
            ctx.requantize = lambda x, step, offset: _RoundToRange.apply(x, step, offset, top, kind)
            return kernels.forward(x, step, offset, codes=Grid(0, top, 1))
        lowest = lowest_code(step, offset, top)
        quantized = (x / step).round_().clamp_(lowest, lowest + top).mul_(step)
        ctx.save_for_backward(x, step, offset, quantized)
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad,) = grads
        x, step, offset, *saved = ctx.saved_tensors
        top: int = ctx.top
        lowest = lowest_code(step, offset, top)
        wanted = (offset / step).round()
        if not saved and (kernels := backward_kernels_for(ctx.kind, x, step)):
            codes = Grid(0, top, 1)
            grad_x, (residual, under, over) = kernels.backward(
                grad, x, step, offset, codes=codes, kind=OFFSET
            )
        else:
            quantized = saved[0] if saved else _RoundToRange.apply(x, step, offset, top, "eager")
            low, high = step * lowest, step * (lowest + top)
            below, above, inside = x < low, x > high, between(x.detach(), low, high)
            under, over = (grad * below).sum_to_size(step.shape), (grad * above).sum_to_size(step.shape)
            residual = (grad * inside * (quantized - x)).sum_to_size(step.shape)
            grad_x = grad * inside
        ends = torch.where(wanted == lowest, over * top, under * lowest + over * (lowest + top))
        grad_step = residual / step + ends
        outside = under + over
        # Descent moves against the gradient: an offset clamped at zero needs a positive one to move back.
        stuck = ((wanted > 0) & (outside < 0)) | ((wanted < -top) & (outside > 0))
        return grad_x, grad_step, torch.where(stuck, 0, outside), None, None
