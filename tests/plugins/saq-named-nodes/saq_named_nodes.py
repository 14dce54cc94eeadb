"""Style ``named_nodes``: QDQ whose nodes are named after layer and operand, with all weights in UINT8.

A node that quantizes is named LAYER/OPERAND/VERB, as ``layer1.0.conv1/weight/dequantize``; a quantizer that several
layers share has the names of all of them, joined by ``+``. Weights of any bits are UINT8 with zero point 128, for
runtimes that have kernels for unsigned bytes only.
"""

from collections import Counter
from typing import Any

from saqcli.export import OnnxStyle, onnx_helpers

VERBS = {"Clip": "clip", "QuantizeLinear": "quantize", "DequantizeLinear": "dequantize", "Mul": "scale"}


class NamedNodes(OnnxStyle):
    """Writes QDQ with descriptive names and UINT8 weights."""

    name, description = "named_nodes", "nodes named after their layers, UINT8 weights"
    containers = ("UINT8",)
    tightest = "most"

    def dequantize_weight(self, graph: Any, node: Any) -> Any:
        """DequantizeLinear of UINT8 codes."""
        codes = onnx_helpers.array_of(node.inputs[0])
        return onnx_helpers.weight(graph, node, *onnx_helpers.packed_unsigned(codes))

    def lower(self, model: Any) -> None:
        """Replace all placeholders, and name the nodes that take their place."""
        super().lower(model)
        used: Counter[str] = Counter()
        for node in model.graph:
            facts = onnx_helpers.annotations(node)
            if facts:
                layers = facts[onnx_helpers.LAYER].replace(onnx_helpers.LAYER_SEPARATOR, "+")
                name = f"{layers}/{facts[onnx_helpers.OPERAND]}/{VERBS[node.op_type]}"
                used[name] += 1
                node.name = name if used[name] == 1 else f"{name}/{used[name]}"
