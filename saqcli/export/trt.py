"""Style ``trt``: INT8 with zero point 0, for TensorRT.

TensorRT quantizes to signed integers around zero. A grid with codes in -128 ... 127 is used directly. Any other (0 ...
255, or a grid of ``lsq_plus`` such as -20 ... 235) is shifted before the quantizer, so that its lowest code becomes
-128, and the shift is compensated after the layer:

    x -- Pad -- Sub(o) -- Q(INT8) -- DQ -- Conv(no padding) -- Add(bias + sum of weights * o)

This is the same function, since padding with zeros comes before the subtraction of the offset. Weights are INT8 per
output channel; INT4 is not used. Codes of asymmetric ranges hold their shift, from -15 to 15 at 4 bits and -127 to 127
at 7, and fit INT8 with zero point 0. Codes of the paper's grid at 8 bits reach 255 and do not fit INT8.

Verified in ONNX Runtime like every style; not tested with a TensorRT engine.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from saqcli.export import onnx_helpers
from saqcli.export.onnx_helpers import clip
from saqcli.export.style import OnnxStyle

LOWEST, HIGHEST = -128, 127


class TrtExporter(OnnxStyle):
    """Writes a graph of INT8 Q/DQ nodes without zero points."""

    name, description = "trt", "INT8 without zero points"
    conditions = ("H9",)  # TensorRT has no such kernels
    containers = ("INT8",)
    tightest = "most"

    def quantize_input(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        """QuantizeLinear to INT8, of shifted values where the grid is not INT8."""
        return _quantize_input(graph, node)

    def dequantize_weight(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        """DequantizeLinear of INT8 codes."""
        codes = onnx_helpers.array_of(node.inputs[0]).astype(np.int8)
        return onnx_helpers.weight(graph, node, codes, ir.DataType.INT8)


def _quantize_input(graph: ir.Graph, node: ir.Node) -> ir.Value:
    x, step = node.inputs
    lowest, highest = onnx_helpers.number(node, "lowest"), onnx_helpers.number(node, "highest")
    assert x is not None
    if highest - lowest < onnx_helpers.BYTE_SPAN:
        x = clip(graph, node, x, lowest, highest)
    if lowest >= LOWEST and highest <= HIGHEST:
        return _codes_and_back(graph, node, x, step)
    offset = (np.float32(lowest - LOWEST) * onnx_helpers.array_of(step)).astype(np.float32)
    products = onnx_helpers.consumers(node.outputs[0])
    if all(_can_compensate(product, node) for product in products):
        pads: list[int] = []
        for product in products:
            pads = _pads(product) if len(products) == 1 else []
            x = _padded(graph, node, product, x) if any(pads) else x
            _compensate(graph, product, offset)
        moved = onnx_helpers.insert_before(graph, node, "Sub", [x, _named(graph, node, offset)])
        return _codes_and_back(graph, node, moved, step, LOWEST - lowest, pads)
    moved = onnx_helpers.insert_before(graph, node, "Sub", [x, _named(graph, node, offset)])
    back = _codes_and_back(graph, node, moved, step, LOWEST - lowest)
    return onnx_helpers.insert_before(graph, node, "Add", [back, _named(graph, node, offset)])


def _named(graph: ir.Graph, node: ir.Node, offset: np.ndarray) -> ir.Value:
    return onnx_helpers.constant(graph, f"{onnx_helpers.text(node, 'layer')}.input.offset", offset)


def _codes_and_back(
    graph: ir.Graph,
    node: ir.Node,
    x: ir.Value,
    step: ir.Value | None,
    moved: int = 0,
    pads: Sequence[int] = (),
) -> ir.Value:
    zero = onnx_helpers.constant(graph, "zero", np.int8(0))
    codes = onnx_helpers.insert_before(graph, node, "QuantizeLinear", [x, step, zero])
    onnx_helpers.add_annotations(codes, **{onnx_helpers.ZERO: str(moved)})
    if any(pads):
        onnx_helpers.add_annotations(codes, **{onnx_helpers.PADS: ",".join(map(str, _tensor_pads(pads)))})
    return onnx_helpers.insert_before(graph, node, "DequantizeLinear", [codes, step, zero])


def _pads(product: ir.Node) -> list[int]:
    return [int(pad) for pad in product.attributes["pads"].as_ints()] if "pads" in product.attributes else []


def _can_compensate(product: ir.Node, node: ir.Node) -> bool:
    """Whether an offset of the input results in a constant per output channel."""
    only_reader = len(onnx_helpers.consumers(node.outputs[0])) == 1
    same_pad = "auto_pad" in product.attributes and product.attributes["auto_pad"].as_string() not in (
        "NOTSET",
        "VALID",
    )
    if (
        product.op_type not in ("Conv", "Gemm", "MatMul")
        or onnx_helpers.weight_of(product) is None
        or same_pad
    ):
        return False
    return product.inputs[0] is node.outputs[0] and (only_reader or not any(_pads(product)))


def _tensor_pads(pads: Sequence[int]) -> list[int]:
    """Pads of a convolution in the format for a tensor (N, C, ...)."""
    half = len(pads) // 2
    return [0, 0, *pads[:half], 0, 0, *pads[half:]]


def _padded(graph: ir.Graph, node: ir.Node, product: ir.Node, x: ir.Value) -> ir.Value:
    """Move the zero padding of the convolution in front of the quantizer."""
    pads = _pads(product)
    amounts = _tensor_pads(pads)
    node.outputs[0].shape = None  # the padded image is larger
    product.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
    constant = onnx_helpers.constant(
        graph, f"{onnx_helpers.text(node, 'layer')}.pads", np.array(amounts, np.int64)
    )
    return onnx_helpers.insert_before(graph, node, "Pad", [x, constant], mode="constant")


def _compensate(graph: ir.Graph, product: ir.Node, offset: np.ndarray) -> None:
    """Add the offset times the sums of the weights after the product."""
    weight = onnx_helpers.weight_of(product)
    assert weight is not None
    codes, step = (onnx_helpers.array_of(value).astype(np.float64) for value in weight.inputs)
    dim = max(onnx_helpers.number(weight, "dim"), 0)
    sums = codes.sum(axis=tuple(d for d in range(codes.ndim) if d != dim)) * step * float(offset)
    shape = (1, -1, *(1,) * (codes.ndim - 2)) if product.op_type == "Conv" else (-1,)
    name = f"{onnx_helpers.text(weight, 'layer')}.offset"
    onnx_helpers.add_after(
        graph, product, onnx_helpers.constant(graph, name, sums.astype(np.float32).reshape(shape))
    )
