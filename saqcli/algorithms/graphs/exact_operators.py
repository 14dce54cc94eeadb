"""Which ATen operators are exact by themselves, and by what the others are replaced.

To add one: its name in ``EXACT_ALONE`` if IEEE 754 defines its result to the last bit, or a function of
``ordered`` beside its name in ``ORDERED``.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saqcli.algorithms.graphs import ordered
from saqcli.errors import UnsupportedModel

# Move numbers about, or put zeros among them.
LAYOUT = set(
    """
    alias clone contiguous view _unsafe_view reshape permute transpose t flatten unflatten squeeze unsqueeze
    expand select slice narrow split split_with_sizes chunk unbind roll flip constant_pad_nd pad pixel_shuffle
    pixel_unshuffle im2col lift_fresh_copy detach dropout repeat index_select channel_shuffle sym_size
    """.split()
)

SEVERAL = {"split", "split_with_sizes", "chunk", "unbind"}  # of LAYOUT: they give several tensors

# One operation of IEEE 754 for each number that comes out, or a choice between numbers.
EXACT_ALONE = set(
    """
    add sub rsub mul div neg abs reciprocal square relu relu6 leaky_relu clamp clamp_min clamp_max
    hardtanh maximum minimum max_pool1d max_pool2d max_pool3d adaptive_max_pool2d amax amin floor ceil round
    where masked_fill cat stack index gather embedding eq ne lt le gt ge logical_and logical_or logical_not
    bitwise_not zeros_like ones_like full_like zeros ones full arange _to_copy to getitem mul floordiv
    upsample_nearest2d _assert_tensor_metadata
    """.split()
)


def _avg_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``torch.nn.functional.avg_pool2d``: shifted images are added up in reading order."""
    sizes, pads = (int(x.shape[-2]), int(x.shape[-1])), _pair(padding)
    kernels, strides = _pair(kernel_size), _pair(stride if len(stride) else kernel_size)
    windows = [_windows(*each, ceil_mode) for each in zip(sizes, kernels, strides, pads, strict=True)]
    (top, bottom), (left, right) = (
        (pad, max(0, (len(starts) - 1) * step + kernel - size - pad))
        for starts, size, kernel, step, pad in zip(windows, sizes, kernels, strides, pads, strict=True)
    )
    padded = F.pad(x, (left, right, top, bottom))
    total: Tensor | None = None
    for offsets in itertools.product(*(range(kernel) for kernel in kernels)):
        rows, columns = (
            slice(offset, offset + (len(starts) - 1) * step + 1, step)
            for offset, starts, step in zip(offsets, windows, strides, strict=True)
        )
        total = padded[..., rows, columns] if total is None else total + padded[..., rows, columns]
    assert total is not None
    if divisor_override:
        return total / float(divisor_override)
    high, wide = (
        [_covered(start, kernel, size, pad if count_include_pad else 0) for start in starts]
        for starts, kernel, size, pad in zip(windows, kernels, sizes, pads, strict=True)
    )
    counts = [[float(rows * columns) for columns in wide] for rows in high]
    same = len({count for line in counts for count in line}) == 1
    return total / (counts[0][0] if same else torch.tensor(counts))


def _windows(size: int, kernel: int, stride: int, pad: int, ceil_mode: bool) -> list[int]:
    """Where the windows along one dimension start; the last one starts within the image or its left padding."""
    room = size + 2 * pad - kernel
    count = -(-room // stride) + 1 if ceil_mode else room // stride + 1
    if ceil_mode and (count - 1) * stride >= size + pad:
        count -= 1
    return [index * stride - pad for index in range(count)]


def _covered(start: int, kernel: int, size: int, pad: int) -> int:
    """How much of a window lies in the image and ``pad`` around it."""
    return min(start + kernel, size + pad) - max(start, -pad)


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return (int(value[0]), int(value[-1]))


def _adaptive_avg_pool2d(x: Tensor, size: Sequence[int]) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool2d``: every cell is the mean of its window."""
    rows, columns = _pair(size)
    height, width = int(x.shape[-2]), int(x.shape[-1])
    if height % rows == 0 and width % columns == 0 and (rows, columns) != (1, 1):
        return _avg_pool2d(x, (height // rows, width // columns))
    cells = [
        ordered.mean(
            x[
                ...,
                i * height // rows : -(-(i + 1) * height // rows),
                j * width // columns : -(-(j + 1) * width // columns),
            ],
            (-2, -1),
            keepdim=True,
        )
        for i in range(rows)
        for j in range(columns)
    ]
    if len(cells) == 1:
        return cells[0]
    lines = [torch.cat(cells[i * columns : (i + 1) * columns], -1) for i in range(rows)]
    return torch.cat(lines, -2)


def _avg_pool1d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """``torch.nn.functional.avg_pool1d``."""
    kernel, step = (1, kernel_size[0]), (1, (stride or kernel_size)[0])
    return _avg_pool2d(x.unsqueeze(-2), kernel, step, (0, padding[0]), ceil_mode, count_include_pad).squeeze(
        -2
    )


def _adaptive_avg_pool1d(x: Tensor, size: Sequence[int]) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool1d``."""
    return _adaptive_avg_pool2d(x.unsqueeze(-2), (1, size[0])).squeeze(-2)


def _sum(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Tensor:
    dims = sorted(d % x.dim() for d in (dim or range(x.dim())))
    x = ordered.total(x, dims)
    return x if keepdim else x.squeeze(dims)


def _norm(
    x: Tensor, order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> Tensor:
    if order != 2:
        raise UnsupportedModel(f"style exact has no norm of order {order}: choose another --style")
    return ordered.sqrt(_sum(x * x, dim, keepdim))


def _power(x: Tensor, exponent: float) -> Tensor:
    if abs(exponent) == 0.5:
        x = ordered.sqrt(x)
        return x if exponent > 0 else 1.0 / x
    if exponent not in range(1, 9):
        raise UnsupportedModel(f"style exact has no power of {exponent}: choose another --style")
    total = x
    for _ in range(int(exponent) - 1):
        total = total * x
    return total


ORDERED: dict[str, Callable[..., Any]] = {
    "mean": ordered.mean,
    "sum": _sum,
    "linalg_vector_norm": _norm,
    "pow": _power,
    "sqrt": ordered.sqrt,
    "rsqrt": lambda x: 1.0 / ordered.sqrt(x),
    "avg_pool2d": _avg_pool2d,
    "avg_pool1d": _avg_pool1d,
    "adaptive_avg_pool1d": _adaptive_avg_pool1d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "exp": ordered.exp,
    "sigmoid": ordered.sigmoid,
    "silu": ordered.silu,
    "tanh": ordered.tanh,
    "erf": ordered.erf,
    "gelu": ordered.gelu,
    "hardsigmoid": ordered.hardsigmoid,
    "hardswish": ordered.hardswish,
    "softmax": ordered.softmax,
    "_softmax": ordered.softmax,
    "layer_norm": ordered.layer_norm,
    "group_norm": ordered.group_norm,
    "rms_norm": ordered.rms_norm,
    "matmul": ordered.matmul,
    "bmm": ordered.matmul,
    "scaled_dot_product_attention": ordered.attention,
}

# With a factor, PyTorch multiplies and adds with one rounding.
SCALED: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, alpha: x + y * alpha,
    "sub": lambda x, y, alpha: x - y * alpha,
    "rsub": lambda x, y, alpha: y - x * alpha,
}
