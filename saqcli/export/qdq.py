"""Style ``qdq``: QuantizeLinear and DequantizeLinear nodes around floating-point operators, read by most runtimes.

    input --Clip--QuantizeLinear--DequantizeLinear--.
                                                     Conv --Add(bias)-- Relu -- ...
    integer weight (INT4 / INT8 / UINT8 / INT16) --Dequant--'

Batch norms are folded into the steps of weights, whose codes stay as they are. Four choices keep the
numbers, each answering something that ONNX Runtime does on its own (``docs/export.md``): weights are integer
constants behind DequantizeLinear; the bias is an Add of its own, since a bias inside Conv or Gemm between
quantized tensors is rounded; activations live in 8-bit containers behind a float Clip; 8-bit weights whose products
can saturate are UINT8 (``graphs.saturation``). Where a layer is quantized to full 8 bits on all sides, the pattern is
the one that ONNX Runtime runs on integers (``graphs.integer_kernels``).

Style ``qdq-vnni`` is the same file with INT8 weights, whose kernels are faster, and right only where the processor has
VNNI or is no x86.
"""

from pathlib import Path

import onnx_ir as ir
from torch import Tensor, nn

from saqcli.export import onnx_helpers, tracing
from saqcli.export.integer_kernels import prepare_integer_kernels
from saqcli.export.model_metadata import ModelFacts, properties
from saqcli.export.onnx_helpers import quantized
from saqcli.export.operators import frozen_copy


class QdqExporter:
    """Writes a graph that ONNX Runtime and OpenVINO read, and compute alike on every processor."""

    suffix = ".onnx"
    conditions: tuple[str, ...] = ()  # hazards that the verdict names as conditions of use
    saturating = False  # whether sums of two products may exceed 16 bits

    def export(self, model: nn.Module, example: Tensor, path: Path, facts: ModelFacts) -> None:
        """Write ``path``.

        Args:
            model: quantized, in eval mode; left as it is.
            example: images (N, C, H, W) to trace with; the batch stays dynamic.
            path: of the file to write.
            facts: kept in the metadata of the file.

        Raises:
            UnsupportedModel: the model cannot be traced by ``torch.export``.
        """
        model_graph = tracing.onnx_graph(frozen_copy(model), example)
        graph = model_graph.graph
        onnx_helpers.merge_inputs(graph)
        onnx_helpers.fold_norms(graph)
        prepare_integer_kernels(graph)
        onnx_helpers.split_bias(graph)
        onnx_helpers.lower(graph, "QuantizeInput", self._quantize_input)
        onnx_helpers.lower(graph, "DequantizeWeight", self._dequantize_weight)
        tracing.save(model_graph, path, properties(facts), facts.saq_version)

    def _quantize_input(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        unsigned = not self.saturating and onnx_helpers.of_product(node)
        codes, step, zero = quantized(graph, node, unsigned=unsigned)
        return onnx_helpers.before(graph, node, "DequantizeLinear", [codes, step, zero])

    def _dequantize_weight(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        codes = (
            onnx_helpers.packed(onnx_helpers.array_of(node.inputs[0]))
            if self.saturating
            else onnx_helpers.packed_safely(node)
        )
        return onnx_helpers.weight(graph, node, *codes)


class VnniExporter(QdqExporter):
    """Style ``qdq-vnni``: INT8 weights whatever their sums."""

    conditions = ("H9",)
    saturating = True
