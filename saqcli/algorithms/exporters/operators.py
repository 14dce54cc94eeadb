"""Two operators that stand for quantizers while a graph is exported, and what they become in ONNX.

``saq::quantize_input`` becomes Clip, QuantizeLinear, DequantizeLinear; ``saq::dequantize_weight`` becomes one
DequantizeLinear over an integer constant. Both compute in PyTorch exactly what the fake quantizers compute,
so the exported module can be run and compared before ONNX comes in. Importing this module registers the
operators with PyTorch; only the exporter imports it.

Plain PyTorch arithmetic would be exported as divisions and roundings, and ``torch.fake_quantize_*`` cannot be
exported at most bit-widths (see ``docs/export.md``).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.onnx_opset import opset21 as op
from torch import Tensor, nn

from saqcli.quant.fake_quantize import codes_of
from saqcli.quant.grids import Grid
from saqcli.quant.quantizers import Quantizer

LARGEST_SPAN = 255  # of UINT8 and INT8: QuantizeLinear saturates there by itself


@torch.library.custom_op("saq::quantize_input", mutates_args=())
def quantize_input(x: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    """``x`` on the grid; ``step`` is a scalar."""
    return codes_of(x, step, Grid(lowest, highest, 1)) * step


@quantize_input.register_fake
def _(x: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("saq::dequantize_weight", mutates_args=())
def dequantize_weight(codes: Tensor, step: Tensor, dim: int) -> Tensor:
    """Integer ``codes`` times ``step``, a scalar or one per slice along ``dim``."""
    shape = [-1 if d == dim else 1 for d in range(codes.dim())] if step.dim() else []
    return codes.float() * step.reshape(shape)


@dequantize_weight.register_fake
def _(codes: Tensor, step: Tensor, dim: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def _input_to_onnx(x: Any, step: Any, lowest: int, highest: int) -> Any:
    """Clip in floating point, so that narrower grids fit the 8-bit container; its bounds fold to constants."""
    dtype, offset = _container(lowest, highest)
    zero = op.Constant(value=ir.tensor(np.array(offset, dtype.numpy()), dtype=dtype))
    if highest - lowest < LARGEST_SPAN:
        bounds = (op.Mul(step, op.Constant(value_float=float(code))) for code in (lowest, highest))
        x = op.Clip(x, *bounds)
    return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)


def _container(lowest: int, highest: int) -> tuple[ir.DataType, int]:
    """The 8-bit type that holds the codes, and the integer that stands for zero in it."""
    if lowest < 0 and lowest >= -128 and highest <= 127:
        return ir.DataType.INT8, 0
    return ir.DataType.UINT8, -lowest


def _weight_to_onnx(codes: Any, step: Any, dim: int) -> Any:
    return op.DequantizeLinear(codes, step, axis=dim)


# Annotated with ``int``, attributes arrive as Python integers.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.saq.quantize_input.default: _input_to_onnx,
    torch.ops.saq.dequantize_weight.default: _weight_to_onnx,
}


class ExportedInput(nn.Module):
    """Stands where the input quantizer was, with its step frozen."""

    step: Tensor

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.grid = quantizer.grid()
        self.register_buffer("step", quantizer.step().detach().reshape(()).clone())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid."""
        result: Tensor = torch.ops.saq.quantize_input(x, self.step, self.grid.lowest, self.grid.highest)
        return result


class ExportedWeight(nn.Module):
    """Stands where the weight quantizer was, with its codes frozen; ignores the float weight."""

    codes: Tensor
    step: Tensor

    def __init__(self, quantizer: Quantizer, weight: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        quantizer, weight = quantizer.fold(weight)
        container = torch.int8 if quantizer.grid().highest <= 127 else torch.int16
        self.register_buffer("codes", quantizer.codes(weight).to(container))
        step = quantizer.step().detach()
        self.register_buffer("step", step.flatten().clone() if step.dim() else step.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The dequantized weight."""
        result: Tensor = torch.ops.saq.dequantize_weight(self.codes, self.step, self.dim)
        return result
