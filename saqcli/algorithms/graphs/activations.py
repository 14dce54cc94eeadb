"""Codes of activations in 8-bit containers, behind a float Clip where the grid is narrower."""

import numpy as np
import onnx_ir as ir

from saqcli.algorithms.graphs import parts


def quantized(
    graph: ir.Graph, node: ir.Node, *, unsigned: bool = False
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The codes of an input placeholder, its step, and the code of zero.

    INT8 where the codes are signed and fit, unless ``unsigned``; else UINT8, shifted so that the lowest code is 0.
    4-bit containers are avoided: with them ONNX Runtime removes a ReLU that is still needed (hazard H4), or fails on
    a Clip (H3).
    """
    x, step = node.inputs
    lowest, highest = parts.number(node, "lowest"), parts.number(node, "highest")
    signed = -128 <= lowest < 0 and highest <= 127 and not unsigned
    zero = np.array(0 if signed else -lowest, np.int8 if signed else np.uint8)
    name = f"{parts.text(node, 'layer')}.input"
    assert x is not None
    assert step is not None
    clipped = clip(graph, node, x, lowest, highest) if highest - lowest < parts.BYTE_SPAN else x
    offset = parts.constant(graph, f"{name}.zero", zero)
    return parts.before(graph, node, "QuantizeLinear", [clipped, step, offset]), step, offset


def clip(graph: ir.Graph, node: ir.Node, x: ir.Value, lowest: int, highest: int) -> ir.Value:
    """``x`` limited to the values of two codes of an input placeholder."""
    unit = parts.array_of(node.inputs[1])
    name = f"{parts.text(node, 'layer')}.input"
    ends = [
        parts.constant(graph, f"{name}.{end}", unit * np.float32(code))
        for end, code in (("least", lowest), ("most", highest))
    ]
    return parts.before(graph, node, "Clip", [x, *ends])
