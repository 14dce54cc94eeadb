"""Placeholders of quantizers in traced graphs, in PyTorch and ONNX.

    saq::quantize_input(x, step)         x on its grid                        saq.QuantizeInput
    saq::input_codes(x, step)            the codes of x, as float32           saq.InputCodes
    saq::input_on_levels(x, step, levels) x on a table of levels             saq.InputOnLevels
    saq::dequantize_weight(codes, step)  step times code                      saq.DequantizeWeight
    saq::weight_codes(codes)             the codes of a weight, as float32    saq.WeightCodes

The operators compute in PyTorch exactly what the fake quantizers compute, so a frozen model can be run and compared
before ONNX is involved. Placeholders carry the grid, the bits and the layer; an exporter replaces them by the nodes of
its style. Plain arithmetic would be exported as divisions and roundings, ``torch.fake_quantize_*`` cannot be exported
at most bit-widths, and the exporter's constant folding would turn a dequantized weight into a float constant
(``docs/export.md``).

Importing this module registers the operators with PyTorch.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset
from torch import Tensor, nn

from saqcli.errors import UnsupportedGrid
from saqcli.quant.grid import Grid, LevelTable, ShiftedGrid, codes_of
from saqcli.quant.junctions.sharing import activation_places
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers import Quantizer, name_of

DOMAIN = "saq"
PER_TENSOR = -1  # instead of a dimension


@torch.library.custom_op("saq::quantize_input", mutates_args=())
def quantize_input(x: Tensor, step: Tensor, lowest: int, highest: int, bits: int, layer: str) -> Tensor:
    """``x`` on the grid; ``step`` is a scalar."""
    return codes_of(x, step, Grid(lowest, highest, 1)) * step


@torch.library.custom_op("saq::input_codes", mutates_args=())
def input_codes(x: Tensor, step: Tensor, lowest: int, highest: int, bits: int, layer: str) -> Tensor:
    """The codes of ``x``, in float32."""
    return codes_of(x, step, Grid(lowest, highest, 1))


@torch.library.custom_op("saq::input_on_levels", mutates_args=())
def input_on_levels(x: Tensor, step: Tensor, levels: Tensor, bits: int, layer: str) -> Tensor:
    """``x`` on the ascending ``levels`` times ``step``, a scalar."""
    return codes_of(x, step, LevelTable(tuple(levels.tolist()))) * step


@torch.library.custom_op("saq::dequantize_weight", mutates_args=())
def dequantize_weight(codes: Tensor, step: Tensor, dim: int, bits: int, shifted: bool, layer: str) -> Tensor:
    """Integer ``codes`` times ``step``, a scalar or one per slice along ``dim``.

    ``shifted`` says that the codes of a slice lie in some range of 2**bits integers, 0 among them.
    """
    return codes.float() * along(step, dim, codes.dim())


@torch.library.custom_op("saq::weight_codes", mutates_args=())
def weight_codes(codes: Tensor, bits: int, layer: str) -> Tensor:
    """Integer ``codes`` in float32."""
    return codes.float()


@quantize_input.register_fake
@input_codes.register_fake
def _(x: Tensor, step: Tensor, lowest: int, highest: int, bits: int, layer: str) -> Tensor:
    return torch.empty_like(x)


@input_on_levels.register_fake
def _(x: Tensor, step: Tensor, levels: Tensor, bits: int, layer: str) -> Tensor:
    return torch.empty_like(x)


@dequantize_weight.register_fake
def _(codes: Tensor, step: Tensor, dim: int, bits: int, shifted: bool, layer: str) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@weight_codes.register_fake
def _(codes: Tensor, bits: int, layer: str) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def along(step: Tensor, dim: int, dims: int) -> Tensor:
    """``step``, a scalar or a vector, shaped to multiply along ``dim`` of a tensor of ``dims`` dimensions."""
    return step.reshape([-1 if d == dim else 1 for d in range(dims)]) if step.dim() else step


def _placeholder(name: str, inputs: tuple[str, ...], ints: tuple[str, ...]) -> Op:
    tensor, kinds = OpSchema.FormalParameter, OpSchema.AttrType
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[tensor(each, "C" if each == "codes" else "T") for each in inputs],
        outputs=[tensor("y", "T")],
        type_constraints=[("T", ["tensor(float)"], ""), ("C", ["tensor(int8)", "tensor(int16)"], "")][
            : 2 if "codes" in inputs else 1
        ],
        attributes=[
            *(OpSchema.Attribute(each, kinds.INT) for each in ints),
            OpSchema.Attribute("layer", kinds.STRING),
        ],
    )
    return Op(Opset(DOMAIN, 1), name, schema)


_GRID = ("lowest", "highest", "bits")
_QUANTIZE_INPUT = _placeholder("QuantizeInput", ("x", "step"), _GRID)
_INPUT_CODES = _placeholder("InputCodes", ("x", "step"), _GRID)
_INPUT_ON_LEVELS = _placeholder("InputOnLevels", ("x", "step", "levels"), ("bits",))
_DEQUANTIZE_WEIGHT = _placeholder("DequantizeWeight", ("codes", "step"), ("dim", "bits", "shifted"))
_WEIGHT_CODES = _placeholder("WeightCodes", ("codes",), ("bits",))


# Annotated with ``int`` and ``str``, attributes arrive as Python values.
def _quantize_input(x: Any, step: Any, lowest: int, highest: int, bits: int, layer: str) -> Any:
    return _QUANTIZE_INPUT(x, step, lowest=lowest, highest=highest, bits=bits, layer=layer)


def _input_codes(x: Any, step: Any, lowest: int, highest: int, bits: int, layer: str) -> Any:
    return _INPUT_CODES(x, step, lowest=lowest, highest=highest, bits=bits, layer=layer)


def _input_on_levels(x: Any, step: Any, levels: Any, bits: int, layer: str) -> Any:
    return _INPUT_ON_LEVELS(x, step, levels, bits=bits, layer=layer)


def _dequantize_weight(codes: Any, step: Any, dim: int, bits: int, shifted: bool, layer: str) -> Any:
    return _DEQUANTIZE_WEIGHT(codes, step, dim=dim, bits=bits, shifted=int(shifted), layer=layer)


def _weight_codes(codes: Any, bits: int, layer: str) -> Any:
    return _WEIGHT_CODES(codes, bits=bits, layer=layer)


PLACEHOLDERS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.saq.quantize_input.default: _quantize_input,
    torch.ops.saq.input_codes.default: _input_codes,
    torch.ops.saq.input_on_levels.default: _input_on_levels,
    torch.ops.saq.dequantize_weight.default: _dequantize_weight,
    torch.ops.saq.weight_codes.default: _weight_codes,
}


def _integer_grid(quantizer: Quantizer) -> Grid:
    """The active grid of a weight, or that of the codes of all channels; the placeholders express integers only."""
    grid = quantizer.grid()
    if isinstance(grid, ShiftedGrid):
        return grid.hull
    if not isinstance(grid, Grid):
        raise UnsupportedGrid(
            f"quantizer {name_of(quantizer)} has a table of levels for weights, and ONNX files need uniform grids"
        )
    return grid


class FrozenInput(nn.Module):
    """Replaces the input quantizer, with its step frozen.

    Attributes:
        grid: the codes.
        bits: width of the codes.
        layer: name of the layer.
        step: a scalar.
        levels: codes of a table of levels, else empty.
    """

    step: Tensor
    levels: Tensor

    def __init__(self, grid: Grid | LevelTable, bits: int, step: Tensor, layer: str) -> None:
        super().__init__()
        self.grid, self.bits, self.layer = grid, bits, layer
        self.register_buffer("step", step.detach().reshape(()).clone())
        codes = grid.codes if isinstance(grid, LevelTable) else ()
        self.register_buffer("levels", torch.tensor(codes, dtype=torch.float32))

    @classmethod
    def of(cls, quantizer: Quantizer, layer: str) -> "FrozenInput":
        """The frozen form of ``quantizer``."""
        grid = quantizer.grid()
        grid = grid if isinstance(grid, LevelTable) else _integer_grid(quantizer)
        return cls(grid, quantizer.bits, quantizer.step(), layer)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid."""
        grid = self.grid
        if isinstance(grid, LevelTable):
            on_levels: Tensor = torch.ops.saq.input_on_levels(
                x, self.step, self.levels, self.bits, self.layer
            )
            return on_levels
        result: Tensor = torch.ops.saq.quantize_input(
            x, self.step, grid.lowest, grid.highest, self.bits, self.layer
        )
        return result


class FrozenWeight(nn.Module):
    """Replaces the weight quantizer, with its codes frozen; ignores the float weight."""

    codes: Tensor
    step: Tensor

    def __init__(self, quantizer: Quantizer, weight: Tensor, dim: int, layer: str) -> None:
        super().__init__()
        self.bits, self.layer = quantizer.bits, layer
        grid, hull = quantizer.grid(), _integer_grid(quantizer)
        self.shifted = isinstance(grid, ShiftedGrid) and grid.levels == 2**self.bits
        container = torch.int8 if hull.lowest >= -128 and hull.highest <= 127 else torch.int16
        quantizer, weight = quantizer.fold(weight)
        self.register_buffer("codes", quantizer.codes(weight).to(container))
        step = quantizer.step().detach()
        self.register_buffer("step", step.flatten().clone() if step.dim() else step.clone())
        self.dim = dim if step.dim() else PER_TENSOR

    def forward(self, weight: Tensor) -> Tensor:
        """The dequantized weight."""
        result: Tensor = torch.ops.saq.dequantize_weight(
            self.codes, self.step, self.dim, self.bits, self.shifted, self.layer
        )
        return result


def label(layer: str) -> str:
    """The name of a layer with spaces escaped, since spaces separate names in a graph."""
    return layer.replace("%", "%25").replace(" ", "%20") if " " in layer else layer


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the quantized model whose quantizers are the operators above; its results are the same.

    Raises:
        UnsupportedGrid: the quantizer of a weight has a table of levels.
    """
    frozen = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    for layer in quantized_layers(frozen).values():  # while all of them know their steps
        if layer.short_steps is not None and (bias := layer._parameters.get("bias")) is not None:
            layer._parameters["bias"] = nn.Parameter(
                bias if (exact := layer.quantized_bias()) is None else exact, requires_grad=False
            )
    for name, layer in quantized_layers(frozen).items():
        layer.short_steps = None
        weights = layer.weight_quantizer
        if isinstance(weights, Quantizer):
            layer.weight_quantizer = FrozenWeight(
                weights, layer.effective_weight(), layer.channel_dim, label(name)
            )
    inputs: dict[Quantizer, FrozenInput] = {}  # one for all readers of a tensor, under the name of the first
    for name, place in activation_places(frozen).items():
        quantizer = place.quantizer
        if isinstance(quantizer, Quantizer):
            if quantizer not in inputs:
                inputs[quantizer] = FrozenInput.of(quantizer, label(name))
            place.put(inputs[quantizer])
    return frozen
