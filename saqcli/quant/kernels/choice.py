"""Which kernel a quantizer computes with: separate torch operations, or one pass over memory."""

from typing import Literal

import torch
from torch import Tensor

from saqcli.quant.kernels import native

KernelKind = Literal["eager", "fused"]
CLIP, PACT, OFFSET = range(3)  # what the gradient of the level is made of, as in quantize.c
RESIDUAL, UNDER, OVER = range(3)  # sums over the tensor, as there


def kernels_for(kind: KernelKind, x: Tensor, level: Tensor) -> native.NativeKernels | None:
    """The kernels that quantize ``x``; None for torch's operations, also where ``torch.compile`` fuses these."""
    if kind == "eager" or torch.compiler.is_compiling() or native.layout_of(x, level) is None:
        return None
    loaded = native.load()
    return None if isinstance(loaded, str) else loaded
