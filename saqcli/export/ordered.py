"""Arithmetic with the same bits in every runtime: exact operations only.

Runtimes differ in summation order and in approximations of functions such as ``exp``. Here sums are taken over integers
so small that float64 represents every partial sum, in any order; functions are polynomials and quotients. Only
addition, multiplication, division, square root, rounding, comparison, maximum and table lookup are used, each a
separate node of the graph, so PyTorch and ONNX Runtime agree bit for bit.

Every function agrees with the PyTorch operator of the same name to a few float32 roundings (tested).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from saqcli.errors import UnsupportedModel

EXACT_DOUBLE = 53  # bits of a float64 integer
_LARGEST_EXPONENT = 87.0  # exp of it is near the largest float32
_HIDDEN = -1e30  # score of masked positions: finite, since inf - inf is NaN
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4  # Cody and Waite: n * high is exact for |n| < 2**15
_EXP = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)  # Taylor, |r| <= ln(2) / 2
# erf(x) = x P(x^2) / Q(x^2) for |x| <= 4; rational approximation of Eigen and XLA.
_ERF_TOP = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_BOTTOM = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def total(x: Tensor, dims: Sequence[int] | int) -> Tensor:
    """The sum over ``dims``, kept with size 1, to a float32 rounding.

    In units of the largest magnitude over ``2**bits`` the summands are rounded to integers, with ``bits`` small enough
    that float64 represents every partial sum, so the order does not matter.
    """
    dims = [dims] if isinstance(dims, int) else list(dims)
    count = math.prod(int(x.shape[d]) for d in dims)
    bits = EXACT_DOUBLE - 1 - math.ceil(math.log2(count)) if count > 1 else EXACT_DOUBLE - 1
    largest = x.abs().amax(dims, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).double()
    units = torch.round(x.double() / largest * 2.0**bits)
    return (units.sum(dims, keepdim=True) * largest * 2.0**-bits).float()


def mean(x: Tensor, dim: Sequence[int] | int | None = None, keepdim: bool = False, **_: Any) -> Tensor:
    """``torch.mean``."""
    dims = sorted(d % x.dim() for d in ([dim] if isinstance(dim, int) else dim or range(x.dim())))
    count = math.prod(int(x.shape[d]) for d in dims)
    x = total(x, dims) / float(count)
    return x if keepdim else x.squeeze(dims)


def exp(x: Tensor) -> Tensor:
    """``torch.exp``, between exp(-87) and exp(87): 2**n times a polynomial in the remainder of ``x``."""
    x = x.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    n = torch.round(x * (1 / math.log(2)))
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    power = _polynomial(r, _EXP)
    return power * _power_of_two(n)


def _power_of_two(n: Tensor) -> Tensor:
    """2**n of integers between -126 and 127, by lookup."""
    table = torch.tensor([[2.0**k] for k in range(-126, 128)], dtype=torch.float32)
    return F.embedding((n + 126.0).to(torch.int64), table).squeeze(-1)


def _polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Polynomial by Horner's rule, highest power first."""
    total = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * x + coefficient
    return total


def sqrt(x: Tensor) -> Tensor:
    """``torch.sqrt``, correctly rounded, through float64: PyTorch's float32 result is sometimes off by one unit.

    The root of a float32 is farther from the midpoint of two float32 values than the float64 error.
    """
    return torch.sqrt(x.double()).float()


def sigmoid(x: Tensor) -> Tensor:
    """``torch.sigmoid``."""
    return 1.0 / (exp(-x) + 1.0)


def silu(x: Tensor) -> Tensor:
    """``torch.nn.functional.silu``."""
    return x / (exp(-x) + 1.0)


def tanh(x: Tensor) -> Tensor:
    """``torch.tanh``."""
    square = x * x
    near_zero = x * _polynomial(square, (-17 / 315, 2 / 15, -1 / 3, 1.0))  # avoids cancellation below
    return torch.where(x.abs() < 0.1, near_zero, 1.0 - 2.0 / (exp(x * 2.0) + 1.0))


def erf(x: Tensor) -> Tensor:
    """``torch.erf``."""
    x = x.clamp(-4.0, 4.0)
    square = x * x
    return (x * _polynomial(square, _ERF_TOP)) / _polynomial(square, _ERF_BOTTOM)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """``torch.nn.functional.gelu``, with both approximations."""
    if approximate == "tanh":
        inner = (x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi)
        return x * 0.5 * (tanh(inner) + 1.0)
    return x * 0.5 * (erf(x * (1 / math.sqrt(2))) + 1.0)


def hardsigmoid(x: Tensor) -> Tensor:
    """``torch.nn.functional.hardsigmoid``."""
    return (x + 3.0).clamp(0.0, 6.0) / 6.0


def hardswish(x: Tensor) -> Tensor:
    """``torch.nn.functional.hardswish``."""
    return x * (x + 3.0).clamp(0.0, 6.0) / 6.0


def softmax(x: Tensor, dim: int, dtype: Any = None) -> Tensor:
    """``torch.softmax``."""
    powers = exp(x - x.amax(dim, keepdim=True))
    return powers / total(powers, dim)


def standardized(x: Tensor, dims: Sequence[int], eps: float) -> Tensor:
    """``x`` minus its mean, divided by its deviation, both over ``dims``."""
    centred = x - mean(x, dims, keepdim=True)
    return centred / sqrt(mean(centred * centred, dims, keepdim=True) + eps)


def layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """``torch.nn.functional.layer_norm``."""
    x = standardized(x, range(x.dim() - len(shape), x.dim()), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """``torch.nn.functional.rms_norm``."""
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    dims = range(x.dim() - len(shape), x.dim())
    x = x / sqrt(mean(x * x, dims, keepdim=True) + eps)
    return x if weight is None else x * weight


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """``torch.nn.functional.group_norm``."""
    normal = standardized(
        x.reshape(x.shape[0], groups, -1, *x.shape[2:]), range(2, x.dim() + 1), eps
    ).flatten(1, 2)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    normal = normal if weight is None else normal * weight.reshape(shape)
    return normal if bias is None else normal + bias.reshape(shape)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``torch.matmul`` of two tensors of at least two dimensions.

    Rows of ``a`` and columns of ``b`` are rounded to integers of so few bits (21 for fewer than 2048 summands) that any
    sum of products is an exact float64 integer.
    """
    count = int(a.shape[-1])
    bits = min(21, (EXACT_DOUBLE - math.ceil(math.log2(count))) // 2)
    a, largest_a = _integers(a, -1, bits)
    b, largest_b = _integers(b, -2, bits)
    product = torch.matmul(a.double(), b.double()).float()
    return product * largest_a * largest_b * 2.0 ** (-2 * bits)


def _integers(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """``x`` in units of its largest magnitude along ``dim`` over ``2**bits``, rounded, and that magnitude."""
    largest = x.abs().amax(dim, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(x / largest * 2.0**bits), largest


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` without dropout.

    Boolean masks hide positions where they are False, others where they are ``-inf``; a fully masked row gives zeros.
    """
    if enable_gqa:
        raise UnsupportedModel("style exact has no attention with grouped queries: choose another `style`")
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    scores = matmul(query * factor, key.transpose(-2, -1))
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:]).tril().bool()
    if attn_mask is None:
        return matmul(softmax(scores, -1), value)
    hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask == -math.inf
    if attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    weights = softmax(scores.masked_fill(hidden, _HIDDEN), -1)
    return matmul(weights.masked_fill(hidden, 0.0), value)
