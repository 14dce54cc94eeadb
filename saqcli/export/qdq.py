"""Style ``qdq``: QuantizeLinear and DequantizeLinear, for most runtimes.

    input --Clip--QuantizeLinear--DequantizeLinear--.
                                                     Conv --Add(bias)-- Relu -- ...
    integer weight (INT4 / INT8 / UINT8 / INT16) --Dequant--'

Batch norms are folded into the steps of weights; codes do not change. Four choices preserve the results, each to avoid
an optimization of ONNX Runtime (``docs/export.md``): weights are integer constants behind DequantizeLinear; the bias is
a separate Add, since a bias inside Conv or Gemm between quantized tensors is rounded; activations have 8-bit containers
behind a float Clip; 8-bit weights whose products can saturate are UINT8 (``onnx_helpers``). A layer with full 8 bits on
all sides has the pattern that ONNX Runtime runs on integers (``integer_kernels``).

Style ``qdq-vnni`` is the same file with INT8 weights, whose kernels are faster, but correct only on processors with
VNNI or other than x86.
"""

from pathlib import Path

import onnx_ir as ir
from torch import Tensor, nn

from saqcli.export import onnx_helpers, tracing
from saqcli.export.integer_kernels import prepare_integer_kernels
from saqcli.export.model_metadata import ModelMetadata, properties
from saqcli.export.onnx_helpers import quantized
from saqcli.export.operators import frozen_copy


class QdqExporter:
    """Writes a graph for ONNX Runtime and OpenVINO with the same results on every processor."""

    suffix = ".onnx"
    conditions: tuple[str, ...] = ()  # hazards that the verdict names as conditions of use
    saturating = False  # whether sums of two products may exceed 16 bits

    def export(self, model: nn.Module, example: Tensor, path: Path, metadata: ModelMetadata) -> None:
        """Write ``path``.

        Args:
            model: quantized, in eval mode; not changed.
            example: images (N, C, H, W) to trace with; the batch stays dynamic.
            path: path of the file to write.
            metadata: written to the file.

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
        tracing.save(model_graph, path, properties(metadata), metadata.saq_version)

    def _quantize_input(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        unsigned = not self.saturating and onnx_helpers.quantizes_product(node)
        codes, step, zero = quantized(graph, node, unsigned=unsigned)
        return onnx_helpers.insert_before(graph, node, "DequantizeLinear", [codes, step, zero])

    def _dequantize_weight(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        codes = (
            onnx_helpers.packed(onnx_helpers.array_of(node.inputs[0]))
            if self.saturating
            else onnx_helpers.packed_safely(node)
        )
        return onnx_helpers.weight(graph, node, *codes)


class VnniExporter(QdqExporter):
    """Style ``qdq-vnni``: INT8 weights, even if their sums may saturate."""

    conditions = ("H9",)
    saturating = True
