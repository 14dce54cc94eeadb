"""The kernels of other devices than the CPU: the formulas of ``quantize.c`` in torch, compiled by ``torch.compile``.

A tensor is seen as one dimension, or as (outer, channels, inner) where channels have their own levels, with symbolic
sizes, and the grid is a tensor, so that a few compilations serve all layers. Inductor keeps them for later processes.
"""

import logging
import os
import tempfile
from functools import cache
from typing import Any

import torch
from torch import Tensor

from saqcli.quant.kernels.layout import CLIP, PACT, Codes, Layout, in_layout_of, layout_of

TINY = 1e-12  # as in quantize.c


class CompiledKernels:
    """The methods of ``NativeKernels``."""

    def __init__(self) -> None:
        """Compiles nothing before the first call; imports the compiler, which takes seconds."""
        prepare_compiler()
        from torch._inductor import config

        exact = hasattr(config, "eager_numerics") and hasattr(config.eager_numerics, "division_rounding")
        options: Any = {"eager_numerics.division_rounding": True} if exact else {}  # else GPUs approximate
        self._forward: Any = torch.compile(_forward, dynamic=True, options=options)
        self._backward: Any = torch.compile(_backward, dynamic=True, options=options)

    def forward(self, x: Tensor, level: Tensor, offset: Tensor | None = None, *, codes: Codes) -> Tensor:
        """As ``NativeKernels.forward``."""
        layout, out = layout_of(x, level), torch.empty_like(x)
        ends = _ends(codes, x.dtype, x.device)
        given = (_levels(level, layout), _levels(offset, layout), ends, codes[2])
        self._forward(_seen(x, layout), *given, _seen(out, layout))
        return out

    def backward(
        self, grad: Tensor, x: Tensor, level: Tensor, offset: Tensor | None = None, *, codes: Codes, kind: int
    ) -> tuple[Tensor, Tensor]:
        """As ``NativeKernels.backward``."""
        layout, grad_x, grad = layout_of(x, level), torch.empty_like(x), in_layout_of(x, grad)
        ends = _ends(codes, x.dtype, x.device)
        given = (_levels(level, layout), _levels(offset, layout), ends, codes[2], kind)
        sums = self._backward(_seen(grad, layout), _seen(x, layout), *given, _seen(grad_x, layout))
        return grad_x, sums.reshape(-1, *level.shape)


def prepare_compiler() -> None:
    """Settings of this process before the first ``torch.compile``.

    Compiled code goes where PyTorch keeps it by default: ``cli.app.main`` names the temporary folder itself, so that no
    other is made on import. The warning that there is no GPU is turned off.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == tempfile.gettempdir():
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _range(level: Tensor, offset: Tensor | None, ends: Tensor) -> tuple[Tensor, ...]:
    """The step, and the ends of the grid in steps and in units of the tensor."""
    if offset is None:
        bound = level.abs().clamp_min(TINY)
        return bound / ends[1], ends[0], ends[1], bound * (ends[0] / ends[1]), bound
    lowest = (offset / level).round().clamp(-ends[1], torch.zeros_like(level))
    return level, lowest, lowest + ends[1], level * lowest, level * (lowest + ends[1])


def _rounded(x: Tensor, step: Tensor, lowest: Tensor, highest: Tensor, stride: int) -> Tensor:
    if stride == 1:
        return _clamped((x / step).round(), lowest, highest) * step
    odd = _clamped(((x / step + highest) / 2).round(), torch.zeros_like(highest), highest)
    return (odd * 2 - highest) * step


def _clamped(x: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """As ``clamp``, which may lose the sign of a zero."""
    return torch.where(x < lowest, lowest, torch.where(x > highest, highest, x))


def _forward(x: Tensor, level: Tensor, offset: Tensor | None, ends: Tensor, stride: int, out: Tensor) -> None:
    step, lowest, highest, _, _ = _range(level, offset, ends)
    out.copy_(_rounded(x, step, lowest, highest, stride))


def _backward(
    grad: Tensor,
    x: Tensor,
    level: Tensor,
    offset: Tensor | None,
    ends: Tensor,
    stride: int,
    kind: int,
    grad_x: Tensor,
) -> Tensor:
    step, lowest, highest, low, high = _range(level, offset, ends)
    inside = ((x <= high) & (x >= low)).to(x.dtype)
    passed = grad * inside
    grad_x.copy_(passed)
    residual = under = over = torch.zeros_like(level)
    axes = list(range(x.ndim)) if level.ndim == 0 else [0, 2]
    if kind != PACT:
        q = _rounded(x, step, lowest, highest, stride)
        terms = (q - x * inside) * grad if kind == CLIP else passed * (q - x)
        residual = terms.sum(axes, keepdim=level.ndim > 0)
        residual = residual / high * torch.where(level < 0, -1, 1) if kind == CLIP else residual
    if kind != CLIP:
        under = (grad * (x < low)).sum(axes, keepdim=level.ndim > 0)
        over = (grad * (x >= high if kind == PACT else x > high)).sum(axes, keepdim=level.ndim > 0)
    return torch.stack([residual, under, over])


def _levels(level: Tensor | None, layout: Layout | None) -> Tensor | None:
    assert layout is not None
    return level if level is None else level.reshape(() if layout.channels == 1 else (1, -1, 1))


def _seen(x: Tensor, layout: Layout | None) -> Tensor:
    """``x`` in its layout; not a view, since compiled functions are guarded by the shape of what is viewed."""
    assert layout is not None
    shape: tuple[int, ...] = (x.numel(),) if layout.channels == 1 else tuple(layout)
    stride = (layout.channels * layout.inner, layout.inner, 1)[-len(shape) :]
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, stride)


@cache
def _ends(codes: Codes, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(codes[:2], dtype=dtype, device=device)


@cache
def load(device: str) -> CompiledKernels | str:
    """The kernels of a type of device; or, where a trial fails, the reason in one line. Asked once a process."""
    try:
        kernels = CompiledKernels()
        x, level = torch.linspace(-1, 1, 64, device=device), torch.ones((), device=device)
        kernels.backward(x, x, level, codes=(0, 15, 1), kind=CLIP)
        kernels.forward(x, level, codes=(0, 15, 1))
    except Exception as error:  # of any of the compilers that torch calls
        return f"torch.compile failed on {device} ({' '.join(str(error).split())[:200]})"
    return kernels
