"""How kernels see tensors, and what both kinds of kernels take and return."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Codes = tuple[int, int, int]  # lowest, highest, stride
CLIP, PACT, OFFSET = range(3)  # what the gradient of the level is made of, as in quantize.c
RESIDUAL, UNDER, OVER = range(3)  # sums over the tensor, as there
DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


class Kernels(Protocol):
    """Both passes of quantization; tensors are those for which ``suits`` is true."""

    def forward(self, x: Tensor, level: Tensor, offset: Tensor | None = None, *, codes: Codes) -> Tensor:
        """``x`` on the grid, in its memory format.

        Args:
            x: any dense tensor.
            level: clipping level; with an offset the step, positive.
            offset: value of the lowest code before rounding, or None.
            codes: lowest, highest, stride; with an offset counted from the lowest.
        """
        ...

    def backward(
        self, grad: Tensor, x: Tensor, level: Tensor, offset: Tensor | None = None, *, codes: Codes, kind: int
    ) -> tuple[Tensor, Tensor]:
        """The gradient to ``x``, and the sums ``RESIDUAL``, ``UNDER`` and ``OVER``, (3, *level.shape).

        Args:
            grad: upstream gradient, in the shape of ``x``.
            x: the rest as in ``forward``.
            level: as there.
            offset: as there.
            codes: as there.
            kind: which sums are needed: ``CLIP``, ``PACT`` or ``OFFSET``; others are 0.
        """
        ...


class Layout(NamedTuple):
    """A dense tensor seen as (outer, channels, inner), in the order of its memory; a channel has its own level."""

    outer: int
    channels: int
    inner: int


def suits(x: Tensor, level: Tensor) -> bool:
    """Whether kernels take ``x``: real memory without gaps, a common dtype, and levels along one dimension at most."""
    return (
        type(x) in _PLAIN
        and type(level) in _PLAIN
        and x.device == level.device
        and x.dtype == level.dtype
        and x.dtype in DTYPES
        and x.numel() > 0
        and level.ndim <= x.ndim
        and level.is_contiguous()
        and (x.is_contiguous() or _dense(x))
        and layout_of(x, level) is not None
    )


def layout_of(x: Tensor, level: Tensor) -> Layout | None:
    """The layout of a dense ``x``; None if the levels lie along two dimensions."""
    count = level.numel()
    if count == 1:
        return Layout(1, 1, x.numel())
    sizes = zip(reversed(level.shape), reversed(x.shape), reversed(x.stride()), strict=False)
    return next(
        (Layout(x.numel() // (count * s), count, s) for size, own, s in sizes if size == count == own), None
    )


def in_layout_of(x: Tensor, grad: Tensor) -> Tensor:
    """``grad`` in the memory format and dtype of ``x``; itself, or a copy."""
    if grad.dtype == x.dtype and grad.stride() == x.stride():
        return grad
    return torch.empty_like(x).copy_(grad)


def _dense(x: Tensor) -> bool:
    filled = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != filled:
                return False
            filled *= size
    return True
