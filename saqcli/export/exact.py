"""Style ``exact``: an ONNX graph whose logits equal PyTorch's bit for bit.

It needs no settings of ONNX Runtime other than the default ones.

    input --Clip--QuantizeLinear(step)--DequantizeLinear(1)--.
                                                              Conv -- Mul(scale[c]) -- Add(shift[c]) -- Relu -- ...
    integer weight --DequantizeLinear(1)---------------------'

The PyTorch reference is the model's exact form (``exact_form``): the same function, in which every sum is a sum of
integers or has a fixed order. Odd codes of the paper's grid whose halves fit 4 bits, ``code = 2 h + 1``, are stored as
``h``.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from saqcli.export import onnx_helpers
from saqcli.export.exact_form import ExactForm
from saqcli.export.onnx_helpers import quantized
from saqcli.export.style import TABLES, OnnxStyle


class ExactExporter(OnnxStyle):
    """Writes a graph that gives the same bits in any runtime with IEEE arithmetic."""

    name, description = "exact", "equal to PyTorch bit for bit"
    bit_equal = one_by_one = tables = True

    def form(self, frozen: nn.Module, example: Tensor) -> nn.Module:
        """The exact form.

        Raises:
            UnsupportedModel: an operator has no exact form.
        """
        return ExactForm(frozen, example)

    def lower(self, model: ir.Model) -> None:
        """Replace the placeholders of codes, with steps applied after products."""
        onnx_helpers.lower(model.graph, "InputCodes", _input_codes)
        onnx_helpers.lower(model.graph, TABLES, onnx_helpers.on_levels)
        _slice_codes(model.graph)
        onnx_helpers.lower(model.graph, "WeightCodes", _weight_codes)


def _input_codes(graph: ir.Graph, node: ir.Node) -> ir.Value:
    codes, _, zero = quantized(graph, node)
    one = onnx_helpers.constant(graph, "one", np.float32(1))
    return onnx_helpers.insert_before(graph, node, "DequantizeLinear", [codes, one, zero])


def _slice_codes(graph: ir.Graph) -> None:
    """Slice the codes of a wide matrix product before, not after, they are dequantized (hazard H2)."""
    for node in [node for node in graph if node.op_type == "Slice"]:
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        readers = onnx_helpers.consumers(node.outputs[0])
        if source is None or source.op_type != "DequantizeLinear" or not readers:
            continue
        if any(reader.op_type not in ("MatMul", "Gemm") for reader in readers):
            continue
        part = ir.node("Slice", [source.inputs[0], *node.inputs[1:]])
        back = ir.node("DequantizeLinear", [part.outputs[0], *source.inputs[1:]])
        back.outputs[0].type, back.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        graph.insert_before(node, [part, back])
        node.outputs[0].replace_all_uses_with(back.outputs[0])
        graph.remove(node, safe=True)


def _weight_codes(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """The codes in the smallest container; odd codes as halves if these fit 4 bits."""
    codes = onnx_helpers.array_of(node.inputs[0])
    halves = (codes.astype(np.int32) - 1) // 2
    if (codes % 2 == 1).all() and not onnx_helpers.fits_int4(codes) and onnx_helpers.fits_int4(halves):
        doubled = onnx_helpers.dequantized(
            graph, node, halves.astype(ml_dtypes.int4), ir.DataType.INT4, np.float32(2)
        )
        return onnx_helpers.insert_before(
            graph, node, "Add", [doubled, onnx_helpers.constant(graph, "one", np.float32(1))]
        )
    return onnx_helpers.dequantized(graph, node, *onnx_helpers.packed_safely(node), np.float32(1))
