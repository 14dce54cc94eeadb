"""Sums of products of codes: exact, or with the saturation of x86 processors without VNNI.

Exact sums are integers, computed by a floating-point convolution that represents all of them: in float32 if no sum of
magnitudes reaches 2**24, otherwise in float64.

Without VNNI, kernels for UINT8 inputs and INT8 weights multiply with VPMADDUBSW, which adds two neighboring products in
16 bits and saturates (``QgemmU8X8KernelAvx2.S``, ``ConvSymKernelAvx2.S``). Inputs are the stored codes, zero point
included. Neighbors are elements 2i and 2i + 1 of an output channel's weights in the order (kernel row, kernel column,
input channel), which convolutions and matrix products share; padding has the code of zero. Depthwise kernels multiply
in 16 bits without saturation (``qdwconv_avx2.cpp``), as do kernels for UINT8 weights (VPMADDWD).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from saqcli.verify.twin.windows import Windows

EXACT_IN_FLOAT32 = 2**24
_LOW, _HIGH = -(2**15), 2**15 - 1
_MOST_ELEMENTS = 2**25  # of an intermediate tensor of the emulation


def exact_type(largest_input: int, weight: Tensor) -> torch.dtype:
    """The fastest floating-point type in which sums of products of integers are exact.

    Args:
        largest_input: largest magnitude of an input.
        weight: integers, (outputs, ...).
    """
    largest = largest_input * int(weight.abs().flatten(1).sum(1).max()) if weight.numel() else 0
    full = torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if full and largest < EXACT_IN_FLOAT32 else torch.float64


def convolve(x: Any, weight: Any, windows: Windows, groups: int) -> Any:
    """Sums of products of a convolution in one to three dimensions.

    Args:
        x: integers without zero point, (N, C, ...).
        weight: integers without zero point, (M, C / groups, ...).
        windows: of the convolution on ``x``.
        groups: number of groups.

    Returns:
        The sums, int32, (N, M, ...).
    """
    w = torch.from_numpy(np.ascontiguousarray(weight, dtype=np.int32))
    dtype = exact_type(int(np.abs(x).max(initial=0)), w)
    padded = padded_input(torch.from_numpy(np.ascontiguousarray(x)).to(dtype), windows)
    operator = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    with torch.no_grad(), torch.backends.nnpack.flags(enabled=False):  # NNPACK has Winograd kernels
        sums = operator(padded, w.to(dtype), None, windows.strides, 0, windows.dilations, groups)
    return _int32(sums)


def padded_input(x: Tensor, windows: Windows, value: float = 0.0) -> Tensor:
    """``x``, (N, C, ...), with the padding of its windows."""
    pairs = list(zip(windows.before, windows.after, strict=True))
    return (
        F.pad(x, [each for pair in reversed(pairs) for each in pair], value=value) if any(windows.pads) else x
    )


def multiply(a: Any, b: Any) -> Any:
    """The matrix product of integers, int32.

    Args:
        a: (..., M, K).
        b: (..., K, N).
    """
    x, w = (torch.from_numpy(np.ascontiguousarray(each, dtype=np.int32)) for each in (a, b))
    columns = w.reshape(-1, *w.shape[-2:]).transpose(1, 2).reshape(-1, w.shape[-2])
    dtype = exact_type(int(x.abs().max()) if x.numel() else 0, columns)
    with torch.no_grad():
        return _int32(x.to(dtype) @ w.to(dtype))


def _int32(sums: Tensor) -> Any:
    """Integers in int32, which wraps like the accumulators of the runtime."""
    if sums.dtype == torch.float32:
        return sums.to(torch.int32).numpy()
    return sums.to(torch.int64).numpy().astype(np.int32)


def saturating_pairs(weight: Any) -> Any:
    """Pairs of neighbors whose sum can leave 16 bits, with inputs of 0 ... 255.

    Args:
        weight: int8 codes, (outputs, K), in the order of the kernel.

    Returns:
        A mask, (outputs, K / 2 rounded up).
    """
    pairs = _paired(np.asarray(weight, np.int32))
    highest, lowest = (255 * np.clip(pairs, *ends).sum(-1) for ends in ((0, None), (None, 0)))
    return (highest > _HIGH) | (lowest < _LOW)


def _paired(weight: Any) -> Any:
    """(outputs, K) as (outputs, K / 2 rounded up, 2)."""
    odd = weight.shape[1] % 2
    return np.pad(weight, ((0, 0), (0, odd))).reshape(len(weight), -1, 2)


def kernel_order(weight: Any) -> Any:
    """Weights of a convolution, (M, C, ...), as (M, K) in the order of the kernel: positions, then channels."""
    return np.moveaxis(weight, 1, -1).reshape(len(weight), -1)


def saturation_error(columns: Any, weight: Any) -> Any:
    """What saturation adds to the exact sums.

    Args:
        columns: stored input codes, 0 ... 255, (rows, K), in the order of the kernel.
        weight: int8 codes, (outputs, K).

    Returns:
        (rows, outputs), int32.
    """
    error = np.zeros((len(weight), len(columns)), np.int32)
    risky = saturating_pairs(weight)
    pairs = _paired(np.asarray(weight, np.int32))[..., None]
    odd = columns.shape[1] % 2
    by_pair = np.pad(columns, ((0, 0), (0, odd))).T.astype(np.int32, order="C")  # (K, rows)
    first, second = by_pair[0::2], by_pair[1::2]
    for output in np.flatnonzero(risky.any(1)):
        where = np.flatnonzero(risky[output])
        for part in np.array_split(where, max(1, len(where) * len(columns) // _MOST_ELEMENTS)):
            sums = first[part] * pairs[output, part, 0] + second[part] * pairs[output, part, 1]
            error[output] += (np.clip(sums, _LOW, _HIGH) - sums).sum(0, dtype=np.int32)
    return error.T


def convolution_columns(codes: Any, zero: int, windows: Windows) -> Any:
    """The inputs of every output pixel, (N * pixels, K), in the order of the kernel; padding has the code ``zero``.

    Args:
        codes: stored codes of one group, (N, C, H, W).
        zero: the zero point.
        windows: of the convolution on ``codes``.
    """
    padded = padded_input(torch.from_numpy(codes.astype(np.float32)), windows, float(zero))
    kernel, dilations, strides = (
        tuple(each) for each in (windows.kernel, windows.dilations, windows.strides)
    )
    unfolded = F.unfold(padded, kernel, dilation=dilations, stride=strides)
    by_position = unfolded.reshape(
        len(codes), codes.shape[1], -1, unfolded.shape[-1]
    )  # (N, C, positions, pixels)
    ordered = by_position.permute(0, 3, 2, 1).reshape(-1, unfolded.shape[1])
    return ordered.numpy().astype(np.uint8)
