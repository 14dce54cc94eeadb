"""Style ``ort``: integers from the input to the logits in ONNX Runtime.

    Q -- DQ -- Conv -- Q -- DQ -- Add -- Q -- DQ -- ...       one QLinearConv, one QLinearAdd, ...
    weight (INT8 / UINT8, INT4 with a Cast) -- DQ --'|
    bias (INT32, in units of the accumulator) -- DQ --'

ONNX Runtime fuses such a pattern into an integer kernel under conditions that the rewritten graph meets
(``integer.graph``): all operands come from DequantizeLinear, the result has one reader, which is a quantizer;
activations are UINT8, also signed ones (zero point 128); the step of a bias is the product of the steps of input and
weight; the weight of a Gemm has a zero point. Which layers do run on integers depends on the quantizers of the network:
a target puts them on the operands of additions, pools and other junctions, and the benchmark of ``saq eval`` lists what
is left.

Codes below 8 bits are limited by a Clip of integers behind the quantizer, so that the convolution before it still ends
in codes. Where a tensor is quantized a second time, to fewer bits, a concatenation of this one tensor carries it from
grid to grid: ONNX Runtime looks every code up in a table of 256.

Weights of up to 4 bits are stored in 4 bits and turned into INT8 by operators on constants, which the runtime evaluates
once, when it opens the file. 8-bit weights whose sums of two products could exceed 16 bits are UINT8, which is slower
on x86 and correct everywhere (``onnx_helpers``); with 7-bit weights no sum can, and all are INT8. Style ``ort-vnni``
has INT8 always.
"""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from saqcli.export import onnx_helpers
from saqcli.export.integer import bias as integer_bias
from saqcli.export.integer import gates
from saqcli.export.integer import graph as integer_graph
from saqcli.export.onnx_helpers import BYTE_SPAN, UINT4_SPAN, array_of, constant, insert_before, number, text
from saqcli.export.style import Coding, OnnxStyle, integer_codes
from saqcli.export.tracing import ANNOTATIONS


def clipped_codes(node: Any, constants: Mapping[str, Any]) -> Coding:
    """The coding of a Clip of integers behind QuantizeLinear; code 0 is in its annotations."""
    (zero,) = (float(entry.value) for entry in node.metadata_props if entry.key == onnx_helpers.ZERO)
    least, most = (constants[name] for name in node.input[1:])
    return Coding(zero=zero, dtype=least.dtype, limits=(float(least) - zero, float(most) - zero))


class OrtExporter(OnnxStyle):
    """Writes a graph whose layers and junctions ONNX Runtime runs in integer kernels."""

    name, description = "ort", "integers from input to logits in ONNX Runtime"
    quantizers = {"QuantizeLinear": integer_codes, "Clip": clipped_codes}  # noqa: RUF012 - a declaration
    containers: tuple[str, ...] = ("INT4", "UINT4", "INT8", "UINT8")
    deployed = True
    equals_twin = True
    saturating = False  # whether sums of two products may exceed 16 bits

    def form(self, frozen: nn.Module, example: Tensor) -> nn.Module:
        """The model with rounded gates, and with biases on the grids of their accumulators."""
        return integer_bias.round_biases(gates.split_gates(frozen), example)

    def lower(self, model: ir.Model) -> None:
        """Replace the placeholders, then pad and rescale codes instead of values."""
        super().lower(model)
        integer_graph.pad_codes(model.graph)
        gates.rescale(model.graph)

    def prepare(self, graph: ir.Graph) -> None:
        """Fold norms, arrange the graph for integer kernels, and separate the biases that are left in float."""
        onnx_helpers.merge_inputs(graph)
        onnx_helpers.fold_norms(graph, keep_containers=False)
        integer_graph.arrange(graph)
        onnx_helpers.split_bias(graph)

    def quantize_input(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        """QuantizeLinear to UINT8, a Clip of the codes where not all of them can occur, and DequantizeLinear."""
        x, step = node.inputs
        lowest = number(node, "lowest")
        assert x is not None
        name, zero = f"{text(node, 'layer')}.input", -lowest
        if integer_graph.ANOTHER in node.attributes:
            axis = min(1, len(x.shape) - 1) if x.shape is not None else 0
            known = x
            x = insert_before(graph, node, "Concat", [x], axis=axis)
            x.type, x.shape = known.type, known.shape
        offset = constant(graph, f"{name}.zero", np.uint8(zero))
        codes = insert_before(graph, node, "QuantizeLinear", [x, step, offset])
        least, most = integer_graph.limits(node)
        all_codes = least == lowest and most - lowest == BYTE_SPAN
        if not all_codes and integer_graph.WITHIN not in node.attributes:
            inner = codes.producer()
            assert inner is not None
            del inner.meta[ANNOTATIONS][onnx_helpers.OPERAND]  # the Clip is the quantizer
            ends = [
                constant(graph, f"{name}.{end}", np.uint8(code + zero))
                for end, code in (("least", least), ("most", most))
            ]
            codes = insert_before(graph, node, "Clip", [codes, *ends])
            onnx_helpers.add_annotations(codes, **{onnx_helpers.ZERO: str(zero)})
        onnx_helpers.add_annotations(codes, **{onnx_helpers.ORDER: str(number(node, onnx_helpers.ORDER))})
        return insert_before(graph, node, "DequantizeLinear", [codes, step, offset])

    def dequantize_weight(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        """DequantizeLinear of INT8 or UINT8 codes with a zero point, or of unpacked 4-bit ones."""
        codes, step = array_of(node.inputs[0]), array_of(node.inputs[1])
        dim = number(node, "dim")
        unpacked = _unpacked(graph, node, codes)
        if unpacked is not None:
            stored, zero = unpacked, np.array(0, np.int8)
        elif self.saturating or not onnx_helpers.may_saturate(codes, max(dim, 0)):
            stored, zero = self._stored(graph, node, codes.astype(np.int8)), np.array(0, np.int8)
        else:
            stored = self._stored(graph, node, onnx_helpers.packed_unsigned(codes)[0])
            zero = np.array(onnx_helpers.UINT8_ZERO, np.uint8)
        inputs = [
            stored,
            constant(graph, f"{text(node, 'layer')}.step", step),
            constant(graph, f"{text(node, 'layer')}.zero", np.full(np.shape(step), zero)),
        ]
        return insert_before(
            graph, node, "DequantizeLinear", inputs, **({} if step.ndim == 0 else {"axis": dim})
        )

    @staticmethod
    def _stored(graph: ir.Graph, node: ir.Node, codes: Any) -> ir.Value:
        return constant(graph, f"{text(node, 'layer')}.codes", codes)


class OrtVnniExporter(OrtExporter):
    """Style ``ort-vnni``: INT8 weights, even if their sums may saturate."""

    name, description = "ort-vnni", "as ort with INT8 weights: faster, wrong on x86 without VNNI"
    conditions = ("H9",)
    containers = ("INT4", "UINT4", "INT8")
    saturating = True


def _unpacked(graph: ir.Graph, node: ir.Node, codes: Any) -> ir.Value | None:
    """INT8 codes, computed from constants of 4 bits; None if they do not fit.

    Codes in -8 ... 7 are stored as such, odd ones of 4 bits as halves, others with a zero point of each channel.
    """
    layer = text(node, "layer")

    def cast(value: Any, dtype: ir.DataType) -> ir.Value:
        return insert_before(graph, node, "Cast", [value], to=int(dtype))

    if onnx_helpers.fits_int4(codes):
        stored = constant(graph, f"{layer}.codes", codes.astype(ml_dtypes.int4), ir.DataType.INT4)
        return cast(stored, ir.DataType.INT8)
    others = tuple(range(1, codes.ndim))
    empty = (codes == 0).all(axis=others, keepdims=True)  # channels that a norm switched off
    halves = np.where(empty, 0, (codes.astype(np.int32) - 1) // 2)
    if codes.size and ((codes % 2 == 1) | empty).all() and onnx_helpers.fits_int4(halves):
        stored = constant(graph, f"{layer}.codes", halves.astype(ml_dtypes.int4), ir.DataType.INT4)
        two, one = (np.where(empty, 0, value).astype(np.int32) for value in (2, 1))
        doubled = insert_before(
            graph, node, "Mul", [cast(stored, ir.DataType.INT32), constant(graph, f"{layer}.two", two)]
        )
        odd = insert_before(graph, node, "Add", [doubled, constant(graph, f"{layer}.one", one)])
        return cast(odd, ir.DataType.INT8)
    low = codes.astype(np.int32).min(axis=others, keepdims=True, initial=0)
    if number(node, "dim") == 0 and (codes - low).max(initial=0) <= UINT4_SPAN:
        stored = constant(graph, f"{layer}.codes", (codes - low).astype(ml_dtypes.uint4), ir.DataType.UINT4)
        moved = insert_before(
            graph,
            node,
            "Add",
            [cast(stored, ir.DataType.INT32), constant(graph, f"{layer}.lowest", low.astype(np.int32))],
        )
        return cast(moved, ir.DataType.INT8)
    return None
