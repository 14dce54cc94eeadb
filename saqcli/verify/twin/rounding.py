"""Float32 arithmetic with the roundings of ONNX Runtime's kernels."""

from typing import Any

import numpy as np

# Coefficients of the rational approximation in ``onnxruntime/core/mlas/lib/logistic.cpp``, from Eigen: odd powers of
# x in the numerator and even powers in the denominator, highest first.
_NUMERATOR = (
    4.37031012579801e-11,
    1.15627324459942e-07,
    6.08574864600143e-05,
    8.51377133304701e-03,
    2.48287947061529e-01,
)
_DENOMINATOR = (
    *(6.10247389755681e-13, 5.76102136993427e-09, 6.29106785017040e-06, 1.70198817374094e-03),
    *(1.16817656904453e-01, 9.93151921023180e-01),
)
_LIMIT = 18.0  # of the argument


def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in float32 with one rounding.

    The product of two float32 is exact in float64. The sum is rounded to odd in float64, after which rounding to
    float32 is correct (Boldo and Melquiond, 2008, "Emulation of a FMA and correctly rounded sums").
    """
    product = np.asarray(a, np.float32).astype(np.float64) * np.asarray(b, np.float32).astype(np.float64)
    summand = np.asarray(c, np.float32).astype(np.float64)
    total = product + summand
    part = total - product  # the error of the sum, exact (Knuth's two-sum)
    error = (product - (total - part)) + (summand - part)
    bits = np.atleast_1d(total).view(np.int64)
    even = (bits & 1) == 0
    toward = np.where(np.atleast_1d(error) > 0, np.inf, -np.inf)
    odd = np.where(
        (np.atleast_1d(error) != 0) & even, np.nextafter(np.atleast_1d(total), toward), bits.view(np.float64)
    )
    return odd.astype(np.float32).reshape(np.shape(total))


def quantize(x: Any, step: Any, zero: Any, ends: tuple[int, int]) -> Any:
    """Codes of float32 values: the quotient is limited and rounded half to even (``mlas/lib/quantize.cpp``).

    Returns:
        The codes in int32.
    """
    low, high = (np.asarray(end - np.asarray(zero, np.int32), np.float32) for end in ends)
    quotient = (x / step).astype(np.float32, copy=False)
    quotient = np.where(np.isnan(quotient), low, quotient)  # MAXPS returns its second operand
    return np.rint(np.minimum(np.maximum(quotient, low), high)).astype(np.int32) + np.asarray(zero, np.int32)


def requantize(sums: Any, scale: Any, zero: int, ends: tuple[int, int]) -> Any:
    """Codes of int32 sums: ``sum * scale``, in float32, limited and rounded half to even (``MlasRequantizeOutput``).

    Args:
        sums: int32.
        scale: float32, broadcast to ``sums``.
        zero: zero point of the codes.
        ends: lowest and highest code.
    """
    low, high = np.float32(ends[0] - zero), np.float32(ends[1] - zero)
    values = sums.astype(np.float32) * scale
    np.maximum(values, low, out=values)
    np.minimum(values, high, out=values)
    np.rint(values, out=values)
    return values.astype(np.int32) + np.int32(zero)


def logistic(x: Any, *, fused: bool) -> Any:
    """The logistic function as MLAS approximates it (``logistic.cpp``, ``LogisticKernelFma3.S``).

    Args:
        x: float32.
        fused: with fused multiply-add, as on processors with AVX2.
    """
    x = np.clip(x, np.float32(-_LIMIT), np.float32(_LIMIT))
    square = (x * x).astype(np.float32)

    def polynomial(coefficients: tuple[float, ...]) -> Any:
        value = np.full_like(x, coefficients[0])
        for each in coefficients[1:]:
            value = fma(square, value, np.float32(each)) if fused else square * value + np.float32(each)
        return value

    quotient = (x * polynomial(_NUMERATOR)) / polynomial(_DENOMINATOR)
    return np.clip(quotient + np.float32(0.5), np.float32(0), np.float32(1))
