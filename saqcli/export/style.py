"""The contract of an ONNX style: how it writes a quantized model, and what the proof has to know of its files.

A style derives from ``OnnxStyle`` and overrides what differs. Without any change it writes QuantizeLinear and
DequantizeLinear in the smallest containers:

    class MyStyle(OnnxStyle):
        name, description = "my", "for my runtime"
        containers = ("INT8",)

        def dequantize_weight(self, graph, node):
            codes = onnx_helpers.array_of(node.inputs[0]).astype(np.int8)
            return onnx_helpers.weight(graph, node, codes, ir.DataType.INT8)

The model is traced to a graph of standard operators and placeholders (``operators``), which carry layer, bits and grid.
A style replaces the placeholders, with the public functions of ``onnx_helpers``. These annotate every node that they
insert for a placeholder with its layer and operand, by which the proof finds the quantizers of a file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from saqcli.errors import UnsupportedModel
from saqcli.export import onnx_helpers, tracing
from saqcli.export.model_metadata import ModelMetadata, properties
from saqcli.export.operators import frozen_copy
from saqcli.quant.bits import MAX_BITS, MIN_BITS

# Containers of weights: bits per code, lowest and highest code. Unsigned ones have their zero in the middle, or, of an
# asymmetric range, at zero points of the channels; FLOAT stores values instead of codes.
CONTAINERS = {
    "INT4": (4, -8, 7),
    "UINT4": (4, -8, 7),
    "INT8": (8, -128, 127),
    "UINT8": (8, -128, 127),
    "INT16": (16, -(2**15), 2**15 - 1),
    "UINT16": (16, -(2**15), 2**15 - 1),
    "FLOAT": (32, -(2**24), 2**24),
}
INPUTS, WEIGHTS = (
    ("QuantizeInput", "InputCodes"),
    ("DequantizeWeight", "WeightCodes"),
)  # kinds of placeholders
TABLES = "InputOnLevels"  # the kind of inputs on tables of levels


@dataclass(frozen=True)
class Coding:
    """How the output of an operator holds the codes of an input: ``(codes + zero) * unit``.

    Attributes:
        unit: value of a difference of one code; 1 for integers.
        zero: what code 0 is stored as.
        dtype: NumPy type of the output; float32 for values, which have no zero.
        limits: the least and the largest code that the operator returns, where that is not the whole grid.
    """

    unit: float = 1.0
    zero: float = 0.0
    dtype: Any = np.float32
    limits: tuple[float, float] | None = None


Reader = Callable[[Any, Mapping[str, Any]], Coding]


def integer_codes(node: Any, constants: Mapping[str, Any]) -> Coding:
    """The coding of QuantizeLinear: integers around its zero point, its third input.

    Args:
        node: ``onnx.NodeProto``.
        constants: arrays of the graph by name.
    """
    zero = constants[node.input[2]]
    shifted = [entry.value for entry in node.metadata_props if entry.key == onnx_helpers.ZERO]
    return Coding(zero=float(shifted[0] if shifted else zero), dtype=zero.dtype)


def scaled_values(node: Any, constants: Mapping[str, Any]) -> Coding:
    """The coding of an operator that returns quantized values, whose second input is the step."""
    return Coding(unit=float(constants[node.input[1]]))


def table_indices(node: Any, constants: Mapping[str, Any]) -> Coding:
    """The coding of the last Where of ``onnx_helpers.on_levels``: indices of levels."""
    return Coding(dtype=np.int64)


class OnnxStyle:
    """Writes a quantized model as ONNX, and declares what is true of its files.

    Attributes:
        name: as in the table of styles; messages have it.
        description: one line for help texts.
        suffix: of its files.
        conditions: codes of hazards (``verify.hazards``) that its files may have; the verdict names them as conditions
            of use. Any other hazard makes a file invalid.
        quantizers: operators that quantize inputs, by name, and how codes are read from their outputs.
        bits: fewest and most bits of weights and inputs that it expresses; others are refused.
        tables: whether it writes inputs on tables of levels, in standard operators; else they are refused.
        containers: types that it stores weights in, of ``CONTAINERS``. Weights that fit none are refused; the reason
            for a large file names them.
        opsets: operator sets beyond the standard one, by domain; files have their operators as functions.
        tightest: whether the fewest or the most bits are hardest to express; the trial export before a long run has
            these bits.
        bit_equal: whether the logits of a file must equal those of ``form`` bit for bit, in float32. The other styles
            are compared with the model in float64, within the limits of ``verify.verdict``.
        one_by_one: whether the proof also runs every image alone.
        deployed: whether ``form`` differs from the model by more than rounding errors, as with biases on a grid. The
            proof then compares a file with ``form``, which keeps the frozen quantizers, and the verdict says how many
            codes of ``form`` differ from those of the model.
        equals_twin: whether the proof fails if a file differs from its twin (``verify.twin``); otherwise the verdict
            reports it.
        exact_sums: whether it keeps sums of short steps exact; the proof then looks for places that are not
            (``verify.exactness``), and without any requires the logits of PyTorch bit for bit.
        short_steps: whether the model that is being written has short steps; set by ``write``.
    """

    name: str = ""
    description: str = ""
    suffix: str = ".onnx"
    conditions: tuple[str, ...] = ()
    quantizers: Mapping[str, Reader] = {"QuantizeLinear": integer_codes, "Where": table_indices}
    tables: bool = False
    bits: tuple[int, int] = (MIN_BITS, MAX_BITS)
    containers: tuple[str, ...] = ("INT4", "UINT4", "INT8", "UINT8", "INT16")
    opsets: Mapping[str, int] = {}
    tightest: Literal["fewest", "most"] = "fewest"
    bit_equal: bool = False
    one_by_one: bool = False
    deployed: bool = False
    equals_twin: bool = False
    exact_sums: bool = False
    short_steps: bool = False

    def export(self, model: nn.Module, example: Tensor, path: Path, metadata: ModelMetadata) -> None:
        """Write ``path``.

        Args:
            model: quantized, in eval mode; not changed.
            example: images (N, C, H, W) to trace with; the batch stays dynamic.
            path: path of the file to write.
            metadata: written to the file.

        Raises:
            UnsupportedModel: the model cannot be traced by ``torch.export``, or the style cannot express it.
        """
        self.write(self.trace(self.form(frozen_copy(model), example), example), path, metadata)

    def trace(self, form: nn.Module, example: Tensor) -> ir.Model:
        """The traced graph of ``form``, with placeholders; styles with the same ``form`` share it.

        Raises:
            UnsupportedModel: the model cannot be traced.
        """
        return tracing.onnx_graph(form, example)

    def write(self, traced: ir.Model, path: Path, metadata: ModelMetadata) -> None:
        """Lower the graph from ``trace``, in place, and write it to ``path``.

        Raises:
            UnsupportedModel: the style cannot express the model.
        """
        self.short_steps = metadata.scheme.short_steps is not None
        self._check_limits(traced.graph)
        self.lower(traced)
        traced.opset_imports.update(self.opsets)
        tracing.save(traced, path, properties(metadata), metadata.saq_version)

    def form(self, frozen: nn.Module, example: Tensor) -> nn.Module:
        """The module that is traced, and that the files of a ``bit_equal`` style must equal.

        An attribute ``accumulators`` of it, of ``integers.Accumulator``, is reported by the verdict.

        Args:
            frozen: the model with placeholders instead of quantizers, from ``frozen_copy``.
            example: images (N, C, H, W).
        """
        return frozen

    def lower(self, model: ir.Model) -> None:
        """Replace all placeholders of the traced ``model``, in place.

        Raises:
            UnsupportedModel: the style cannot express a layer; the message names the style, and another way.
        """
        self.prepare(model.graph)
        onnx_helpers.lower(model.graph, "QuantizeInput", self.quantize_input)
        onnx_helpers.lower(model.graph, TABLES, onnx_helpers.on_levels)
        onnx_helpers.lower(model.graph, "DequantizeWeight", self.dequantize_weight)

    def prepare(self, graph: ir.Graph) -> None:
        """Change the graph before placeholders are replaced: merge quantizers, fold norms, separate biases."""
        onnx_helpers.merge_inputs(graph)
        onnx_helpers.fold_norms(graph)
        onnx_helpers.split_bias(graph)

    def quantize_input(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        """Insert the nodes of a placeholder of an input before it; return its quantized values."""
        codes, step, zero = onnx_helpers.quantized(graph, node)
        return onnx_helpers.insert_before(graph, node, "DequantizeLinear", [codes, step, zero])

    def dequantize_weight(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        """Insert the nodes of a placeholder of a weight before it; return its values."""
        return onnx_helpers.weight(graph, node, *onnx_helpers.packed_safely(node))

    def _check_limits(self, graph: ir.Graph) -> None:
        """Refuse bits outside ``bits``, and weights whose codes fit none of ``containers``."""
        for node in onnx_helpers.placeholders(graph, TABLES):
            if not self.tables:
                raise UnsupportedModel(
                    f"style {self.name} has uniform grids only, and the input of {onnx_helpers.text(node, 'layer')} "
                    "has a table of levels: choose `style=qdq` or `style=exact`, or another "
                    "`quantization.activation_quantizer`"
                )
        least, most = self.bits
        for node in onnx_helpers.placeholders(graph, *INPUTS, *WEIGHTS, TABLES):
            bits = onnx_helpers.number(node, "bits")
            if not least <= bits <= most:
                raise UnsupportedModel(
                    f"style {self.name} has {least if least == most else f'{least} to {most}'} bits only, and "
                    f"{onnx_helpers.text(node, 'layer')} has {bits}: choose another `style`, or quantize to other bits"
                )
        for node in onnx_helpers.placeholders(graph, *WEIGHTS):
            codes = onnx_helpers.array_of(node.inputs[0])
            lowest, highest = int(codes.min(initial=0)), int(codes.max(initial=0))
            if not any(
                low <= lowest and highest <= high
                for _, low, high in map(CONTAINERS.__getitem__, self.containers)
            ):
                raise UnsupportedModel(
                    f"style {self.name} has {' and '.join(self.containers)} weights only, and the codes of "
                    f"{onnx_helpers.text(node, 'layer')} reach {max(-lowest, highest)}: choose another `style`, or "
                    "quantize with `quantization.weight_grid=auto`"
                )


def widths(style: type[OnnxStyle]) -> tuple[int, ...]:
    """Bits per code of the containers of a style, smallest first."""
    return tuple(sorted({CONTAINERS[each][0] for each in style.containers}))


def declaration_problem(style: type[OnnxStyle]) -> str | None:
    """Why the attributes of a style are not as documented, or None."""
    for attribute in ("name", "description"):
        if not getattr(style, attribute) or "\n" in getattr(style, attribute):
            return f"its {attribute} is not one line"
    if style.suffix != ".onnx":
        return "its suffix is not .onnx"
    unknown = [each for each in style.containers if each not in CONTAINERS]
    if unknown or not style.containers:
        return f"its containers are not some of {', '.join(CONTAINERS)}"
    least, most = style.bits
    if not MIN_BITS <= least <= most <= MAX_BITS:
        return f"its bits are not two numbers from {MIN_BITS} to {MAX_BITS}"
    if style.tightest not in ("fewest", "most"):
        return "its tightest is neither fewest nor most"
    return None
