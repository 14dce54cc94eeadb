"""Layers that round their quantized input again in the backward pass in the place of keeping it.

A layer saves its input for the gradient of its weight. The tensor in front of the quantizer is kept anyway: for the
quantizer's own gradient, and often by the activation function that computed it. So the quantized one need not be.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Recipe(NamedTuple):
    """A quantized tensor, or a view of all of it, given by the node that computed it and the strides it had."""

    node: Any
    laid_out: tuple[int, ...]
    shape: torch.Size
    stride: tuple[int, ...]


def rounded_again(quantized: Tensor) -> AbstractContextManager[Any]:
    """Within the context, operations that save ``quantized`` save how to compute it, if a fused kernel did.

    The saved tensors of the quantizer are read when it is computed again, with autograd's own checks: an error if they
    were modified or freed. Gradients of gradients are the same as without. Where others hook saved tensors, such as
    gradient checkpointing, nothing changes: autograd would call the innermost hooks alone.
    """
    node: Any = None if torch.compiler.is_compiling() else quantized.grad_fn
    if not hasattr(node, "requantize") or _hooked():
        return nullcontext()
    address, version, laid_out = quantized.data_ptr(), quantized._version, quantized.stride()
    count, dtype = quantized.numel(), quantized.dtype

    def pack(saved: Tensor) -> Tensor | _Recipe:
        whole = saved.data_ptr() == address and saved.numel() == count and saved.dtype == dtype
        if whole and saved._version == version:  # else the layer itself modified it first
            return _Recipe(node, laid_out, saved.shape, saved.stride())
        return saved

    return saved_tensors_hooks(pack, _unpack)


def _hooked() -> bool:
    """Whether others hook saved tensors, or forbid it."""
    state: Any = torch._C._autograd
    return not state._saved_tensors_hooks_is_enabled() or state._top_saved_tensors_default_hooks(False)


def _unpack(saved: Tensor | _Recipe) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    with torch.no_grad():
        again: Tensor = saved.node.requantize(*saved.node.saved_tensors)
    if again.stride() != saved.laid_out:  # hooks around the quantizer gave its input back in another layout
        again = again.new_empty_strided(again.shape, saved.laid_out).copy_(again)
    return again.as_strided(saved.shape, saved.stride)
