"""ONNX Runtime's operators on codes, in numpy, each with the source of its formula.

Files are those of ``onnxruntime/contrib_ops/cpu/quantization`` and ``onnxruntime/core/mlas/lib``. All float arithmetic
is float32 with one rounding an operation, unless a fused multiply-add is named.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from saqcli.machine import cpu_flags
from saqcli.verify.twin import products
from saqcli.verify.twin.graph import Node
from saqcli.verify.twin.rounding import fma, logistic, quantize, requantize
from saqcli.verify.twin.windows import Windows, average, windows_of

_ENDS = {np.dtype(np.uint8): (0, 255), np.dtype(np.int8): (-128, 127)}


@dataclass(frozen=True)
class Machine:
    """What of the processor changes results.

    Attributes:
        fused: AVX2 with fused multiply-add: QLinearAdd and QLinearSigmoid round once for a product and a sum.
        saturates: no VNNI: products of UINT8 inputs and INT8 weights saturate.
    """

    fused: bool = True
    saturates: bool = False

    @classmethod
    def here(cls, flags: frozenset[str] | None = None) -> "Machine | None":
        """This processor; None if it is not a known x86 processor, whose kernels have other roundings.

        Args:
            flags: from ``cpu_flags``, which is the default.
        """
        flags = cpu_flags() if flags is None else flags
        if "sse4_1" not in flags:
            return None
        fused = {"avx2", "fma"} <= flags
        vnni = bool(flags & {"avx512_vnni", "avx_vnni", "amx_int8"})
        return cls(fused, saturates=fused and not vnni)


@dataclass(frozen=True)
class Grid:
    """Step and zero point of one tensor of codes.

    Attributes:
        step: float32; one value, or one a channel for weights.
        zero: int32, with the shape of ``step``.
        dtype: ``uint8`` or ``int8``.
    """

    step: Any
    zero: Any
    dtype: Any

    @property
    def ends(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return _ENDS[np.dtype(self.dtype)]

    @property
    def one_zero(self) -> int:
        """The zero point of a tensor with one for all values."""
        return int(self.zero.reshape(-1)[0])

    @property
    def one_step(self) -> np.float32:
        """The step of a tensor with one for all values."""
        return np.float32(self.step.reshape(-1)[0])


def _grid(step: Any, zero: Any, dtype: Any) -> Grid:
    zeros = np.zeros(np.shape(step), np.int32) if zero is None else np.asarray(zero).astype(np.int32)
    return Grid(np.asarray(step, np.float32), zeros, np.dtype(dtype))


def _triple(values: list[Any], first: int) -> tuple[Any, Grid]:
    """Codes and their grid from three neighboring inputs."""
    codes, step, zero = values[first : first + 3]
    return codes, _grid(step, zero, codes.dtype)


def _result(values: list[Any], first: int, dtype: Any) -> Grid:
    return _grid(
        values[first], values[first + 1], dtype if values[first + 1] is None else values[first + 1].dtype
    )


def _along(values: Any, rank: int, dim: int) -> Any:
    """One value a channel, broadcast along ``dim`` of a tensor; one value for all as it is."""
    return (
        values.reshape(-1)
        if values.size == 1
        else values.reshape([-1 if d == dim else 1 for d in range(rank)])
    )


def convolution(node: Node, values: list[Any], machine: Machine) -> Any:
    """``qlinearconv.cc``: sums in int32 with the bias, ``step_x * step_w / step_y``, ``MlasRequantizeOutput``."""
    (x, fed), (w, weights) = _triple(values, 0), _triple(values, 3)
    result = _result(values, 6, x.dtype)
    bias = values[8] if len(values) > 8 else None
    rank = x.ndim - 2
    groups = int(node.attribute("group", 1))
    windows = windows_of(node, x.shape[2:], w.shape[2:])
    centered = w.astype(np.int32) - _along(weights.zero, w.ndim, 0)
    sums = products.convolve(x.astype(np.int16) - np.int16(fed.one_zero), centered, windows, groups)
    if machine.saturates and w.dtype == np.int8 and not _depthwise(w, groups) and rank == 2:
        sums = sums + _saturation(x, fed, w, groups, windows)
    if bias is not None:
        sums = sums + bias.astype(np.int32).reshape(1, -1, *[1] * rank)
    scale = (fed.one_step * weights.step.reshape(-1)).astype(np.float32) / result.one_step
    codes = requantize(sums, _along(scale, x.ndim, 1), result.one_zero, result.ends)
    return codes.astype(result.dtype)


def _depthwise(w: Any, groups: int) -> bool:
    return bool(w.shape[1] == 1 and len(w) == groups)


def _saturation(x: Any, fed: Grid, w: Any, groups: int, windows: Windows) -> Any:
    """What saturation adds to the sums of a convolution, with the shape of the sums."""
    error = np.zeros((len(x), len(w), *windows.count), np.int32)
    codes = unsigned(x)
    zero = fed.one_zero + (128 if x.dtype == np.int8 else 0)
    inputs, outputs = w.shape[1], len(w) // groups
    for group in range(groups):
        weight = products.kernel_order(w[group * outputs : (group + 1) * outputs])
        if not products.saturating_pairs(weight).any():
            continue
        part = codes[:, group * inputs : (group + 1) * inputs]
        columns = products.convolution_columns(part, zero, windows)
        found = products.saturation_error(columns, weight).reshape(len(x), *windows.count, outputs)
        error[:, group * outputs : (group + 1) * outputs] = np.moveaxis(found, -1, 1)
    return error


def unsigned(codes: Any) -> Any:
    """Codes as kernels for unsigned inputs store them: signed ones are shifted by 128."""
    return codes if codes.dtype == np.uint8 else (codes.astype(np.int16) + 128).astype(np.uint8)


def _product(a: Any, fed: Grid, b: Any, weights: Grid, machine: Machine) -> Any:
    """Sums of a matrix product, int32."""
    zeros = weights.zero if weights.zero.size == 1 or weights.zero.ndim > 1 else weights.zero.reshape(1, -1)
    sums = products.multiply(a.astype(np.int32) - fed.one_zero, b.astype(np.int32) - zeros)
    if machine.saturates and b.dtype == np.int8 and b.ndim == 2:
        flat = unsigned(a).reshape(-1, a.shape[-1])
        sums = sums + products.saturation_error(flat, np.ascontiguousarray(b.T)).reshape(sums.shape)
    return sums


def matmul(node: Node, values: list[Any], machine: Machine) -> Any:
    """``quantize_linear_matmul.cc``: ``step_a * step_b / step_y``, then as a convolution."""
    (a, fed), (b, weights) = _triple(values, 0), _triple(values, 3)
    result = _result(values, 6, a.dtype)
    scale = (fed.one_step * weights.step).astype(np.float32) / result.one_step
    sums = _product(a, fed, b, weights, machine)
    return requantize(sums, scale, result.one_zero, result.ends).astype(result.dtype)


def matmul_to_float(node: Node, values: list[Any], machine: Machine) -> Any:
    """``matmul_integer_to_float.cc``: ``sum * (step_a * step_b)``, in float32."""
    a, b, step_a, step_b, zero_a, zero_b = (*values, None, None)[:6]
    fed, weights = _grid(step_a, zero_a, a.dtype), _grid(step_b, zero_b, b.dtype)
    sums = _product(a, fed, b, weights, machine)
    product = sums.astype(np.float32) * (fed.one_step * weights.step).astype(np.float32)
    bias = values[6] if len(values) > 6 else None
    return product if bias is None else product + bias


def gemm(node: Node, values: list[Any], machine: Machine) -> Any:
    """``quant_gemm.cc``: the bias is part of the sums; without a quantizer after it, ``sum * (step_a * step_b)``."""
    (a, fed), (b, weights) = _triple(values, 0), _triple(values, 3)
    bias = values[6] if len(values) > 6 else None
    a = a.T if node.attribute("transA", 0) else a
    b = b.T if node.attribute("transB", 0) else b
    sums = _product(np.ascontiguousarray(a), fed, np.ascontiguousarray(b), weights, machine)
    if bias is not None:
        sums = sums + bias.astype(np.int32)
    scale = (fed.one_step * weights.step.reshape(-1)).astype(np.float32)
    if len(values) <= 7:
        return sums.astype(np.float32) * scale
    result = _result(values, 7, a.dtype)
    return requantize(sums, scale / result.one_step, result.one_zero, result.ends).astype(result.dtype)


def add(node: Node, values: list[Any], machine: Machine) -> Any:
    """``qladd_avx2.cpp``, ``qladd.cpp``: with ratios ``r = step / step_y``,
    ``zero_y - (r_a * zero_a + r_b * zero_b) + r_b * b + r_a * a``, rounded half to even.
    """
    (a, one), (b, other) = _triple(values, 0), _triple(values, 3)
    result = _result(values, 6, a.dtype)
    ratio_a, ratio_b = one.one_step / result.one_step, other.one_step / result.one_step
    zero_a, zero_b = np.float32(one.one_zero), np.float32(other.one_zero)
    scalar_a, scalar_b = _scalar_operands(a.shape, b.shape)
    if scalar_a:  # the kernel takes the operand that is one value for a whole row second
        a, b, ratio_a, ratio_b, zero_a, zero_b = b, a, ratio_b, ratio_a, zero_b, zero_a
    one_row = scalar_a or scalar_b
    f, g = a.astype(np.float32), b.astype(np.float32)
    zero = np.float32(result.one_zero)
    if machine.fused:
        fixed = np.float32(zero - fma(ratio_a, zero_a, ratio_b * zero_b))
        total = fma(f, ratio_a, fma(g, ratio_b, fixed))
    else:
        fixed = np.float32(zero - np.float32(ratio_a * zero_a + ratio_b * zero_b))
        total = (fixed + g * ratio_b) + f * ratio_a if one_row else (fixed + f * ratio_a) + g * ratio_b
    return np.clip(np.rint(total), *result.ends).astype(result.dtype)


def _scalar_operands(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether an operand is one value for each row of the broadcast result that the runtime handles at once.

    ``Broadcaster`` begins rows at the innermost dimension in which an operand is larger than 1, at the latest at the
    first dimension of the operand that has fewer. There both may be 1: the rows have one element.
    """
    dims = range(1, max(1, min(len(a), len(b))) + 1)
    sizes = [tuple(shape[-dim] if dim <= len(shape) else 1 for shape in (a, b)) for dim in dims]
    x, y = next((pair for pair in sizes if max(pair) > 1), sizes[-1])
    return x == 1, x != 1 and y == 1


def multiplication(node: Node, values: list[Any], machine: Machine) -> Any:
    """``qlmul.cpp``: ``(a - zero_a) * (b - zero_b) * (step_a * step_b / step_y) + zero_y``."""
    (a, one), (b, other) = _triple(values, 0), _triple(values, 3)
    result = _result(values, 6, a.dtype)
    integers = (a.astype(np.int32) - one.one_zero) * (b.astype(np.int32) - other.one_zero)
    scale = np.float32(one.one_step * other.one_step) / result.one_step
    total = integers.astype(np.float32) * scale + np.float32(result.one_zero)
    return np.clip(np.rint(total), *result.ends).astype(result.dtype)


def _table(fed: Grid, result: Grid, function: Callable[[Any], Any]) -> Any:
    """The result of every code, (256,), by the bits of the code (``qlinear_lookup_table.cc``)."""
    codes = np.arange(256, dtype=np.uint8).view(fed.dtype).astype(np.int32)
    values = fed.one_step * (codes - fed.one_zero).astype(np.float32)
    return quantize(function(values), result.one_step, result.one_zero, result.ends).astype(result.dtype)


def _looked_up(values: list[Any], function: Callable[[Any], Any]) -> Any:
    x, fed = _triple(values, 0)
    return _table(fed, _result(values, 3, x.dtype), function)[x.view(np.uint8)]


def sigmoid(node: Node, values: list[Any], machine: Machine) -> Any:
    """``qlinear_activations.cc``: a table of MLAS's logistic function."""
    return _looked_up(values, lambda x: logistic(x, fused=machine.fused))


def leaky_relu(node: Node, values: list[Any], machine: Machine) -> Any:
    """``qlinear_activations.cc``: a table."""
    alpha = np.float32(node.attribute("alpha", 0.01))
    return _looked_up(values, lambda x: np.where(x >= 0, x, alpha * x))


def concat(node: Node, values: list[Any], machine: Machine) -> Any:
    """``qlinear_concat.cc``: a table an operand; operands on the grid of the result are copied."""
    parts = []
    for first in range(2, len(values), 3):
        x, fed = _triple(values, first)
        result = _grid(values[0], values[1], x.dtype)
        same = fed.one_step == result.one_step and fed.one_zero == result.one_zero
        parts.append(x if same else _table(fed, result, lambda v: v)[x.view(np.uint8)])
    return np.concatenate(parts, int(node.attribute("axis", 1)))


def global_average_pool(node: Node, values: list[Any], machine: Machine) -> Any:
    """``qlgavgpool.cpp``: the sum of codes without zero point, times ``step_x / (step_y * pixels)``."""
    x, fed = _triple(values, 0)
    result = _result(values, 3, x.dtype)
    dims = tuple(range(2, x.ndim))
    pixels = int(np.prod(x.shape[2:]))
    sums = x.sum(dims, dtype=np.int32, keepdims=True) - np.int32(fed.one_zero * pixels)
    scale = fed.one_step / np.float32(result.one_step * np.float32(pixels))
    return requantize(sums, scale, result.one_zero, result.ends).astype(result.dtype)


def average_pool(node: Node, values: list[Any], machine: Machine) -> Any:
    """``qlinear_pool.cc``: float32 values, added position by position, divided by their number, quantized."""
    x, fed = _triple(values, 0)
    result = _result(values, 3, x.dtype)
    floats = fed.one_step * (x.astype(np.int32) - fed.one_zero).astype(np.float32)
    mean = average(node, floats)
    total = mean / result.one_step + np.float32(result.one_zero)
    return np.clip(np.rint(total), *result.ends).astype(result.dtype)


OPERATORS: dict[str, Callable[[Node, list[Any], Machine], Any]] = {
    "QLinearConv": convolution,
    "QLinearMatMul": matmul,
    "MatMulIntegerToFloat": matmul_to_float,
    "QGemm": gemm,
    "QLinearAdd": add,
    "QLinearMul": multiplication,
    "QLinearConcat": concat,
    "QLinearGlobalAveragePool": global_average_pool,
    "QLinearAveragePool": average_pool,
    "QLinearSigmoid": sigmoid,
    "QLinearLeakyRelu": leaky_relu,
}
