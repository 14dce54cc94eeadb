"""Style ``qdq``: QuantizeLinear and DequantizeLinear, for most runtimes.

    input --Clip--QuantizeLinear--DequantizeLinear--.
                                                     Conv --Add(bias)-- Relu -- ...
    integer weight (INT4 / INT8 / UINT8 / INT16) --Dequant--'

Batch norms are folded into the steps of weights; codes do not change. Four choices preserve the results, each to avoid
an optimization of ONNX Runtime (``docs/export.md``): weights are integer constants behind DequantizeLinear; the bias is
a separate Add, since a bias inside Conv or Gemm between quantized tensors is rounded; activations have 8-bit containers
behind a float Clip; 8-bit weights whose products can saturate are UINT8 (``onnx_helpers``). A layer with full 8 bits on
all sides has the pattern that ONNX Runtime runs on integers (``integer_kernels``).

With short steps (``quant.short_steps``) float sums are exact, so that the file equals PyTorch bit for bit
(``exact_sums``).

Style ``qdq-vnni`` is the same file with INT8 weights, whose kernels are faster, but correct only on processors with
VNNI or other than x86.
"""

import onnx_ir as ir

from saqcli.export import onnx_helpers
from saqcli.export.exact_sums import divide_sums, keep_in_float, separate_additions
from saqcli.export.integer_kernels import prepare_integer_kernels
from saqcli.export.onnx_helpers import quantized
from saqcli.export.style import OnnxStyle


class QdqExporter(OnnxStyle):
    """Writes a graph for ONNX Runtime and OpenVINO with the same results on every processor."""

    name, description = "qdq", "read by most runtimes"
    tables = True
    exact_sums = True
    saturating = False  # whether sums of two products may exceed 16 bits

    def prepare(self, graph: ir.Graph) -> None:
        """As in every style, and for integer kernels."""
        onnx_helpers.merge_inputs(graph)
        onnx_helpers.fold_norms(graph)
        if self.short_steps:
            divide_sums(graph)
        else:
            prepare_integer_kernels(graph)
        onnx_helpers.split_bias(graph)
        if self.short_steps:
            separate_additions(graph)
            keep_in_float(graph)

    def quantize_input(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        """QuantizeLinear and DequantizeLinear; UINT8 where two activations are multiplied."""
        unsigned = not self.saturating and onnx_helpers.quantizes_product(node)
        codes, step, zero = quantized(graph, node, unsigned=unsigned)
        return onnx_helpers.insert_before(graph, node, "DequantizeLinear", [codes, step, zero])


class VnniExporter(QdqExporter):
    """Style ``qdq-vnni``: INT8 weights, even if their sums may saturate."""

    name, description = "qdq-vnni", "with INT8 weights: faster, wrong on x86 without VNNI"
    conditions = ("H9",)
    containers = ("INT4", "INT8", "INT16")
    saturating = True

    def dequantize_weight(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        """DequantizeLinear of codes in the smallest container."""
        return onnx_helpers.weight(graph, node, *onnx_helpers.packed(onnx_helpers.array_of(node.inputs[0])))
