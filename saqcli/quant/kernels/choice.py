"""Which kernel a quantizer computes with: separate torch operations, or one pass over memory."""

from typing import Literal

import torch
from torch import Tensor

from saqcli.quant.kernels import compiled, native
from saqcli.quant.kernels.layout import Kernels, suits

KernelKind = Literal["eager", "fused"]


def fused_kernels(device: str) -> Kernels | str:
    """Those of a type of device, built on first use; or why there are none, in one line."""
    return native.load() if device == "cpu" else compiled.load(device)


def kernels_for(kind: KernelKind, x: Tensor, level: Tensor) -> Kernels | None:
    """The kernels that quantize ``x``; None for torch's operations, also where ``torch.compile`` fuses these."""
    if kind == "eager" or torch.compiler.is_compiling() or not suits(x, level):
        return None
    found = fused_kernels(x.device.type)
    return None if isinstance(found, str) else found


def backward_kernels_for(kind: KernelKind, x: Tensor, level: Tensor) -> Kernels | None:
    """Those of a backward pass; None for torch's operations, also where gradients are differentiated.

    ``x`` is asked about again: what autograd saved may come back in another layout or class, by hooks or a compiler.
    """
    return None if torch.is_grad_enabled() else kernels_for(kind, x, level)
