"""Style ``trt``: INT8 everywhere, zero point 0, the shape that TensorRT documents for explicit quantization.

TensorRT quantizes to signed integers around zero. A grid whose codes lie in -128 ... 127 fits as it is. One that
does not (0 ... 255, or a grid of ``lsq_plus`` such as -20 ... 235) is moved in front of the quantizer, by as many
steps as bring its lowest code to -128, and set right behind the layer:

    x -- Pad -- Sub(o) -- Q(INT8) -- DQ -- Conv(no padding) -- Add(bias + sum of weights * o)

which is the same function, since padding with zeros happens before the offset is taken away. Weights are INT8
per output channel. Codes of the paper's grid at 8 bits reach 255 and have no INT8 container.

Verified in ONNX Runtime like every style; no TensorRT engine was built.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from saqcli.errors import UnsupportedModel
from saqcli.export import onnx_helpers, tracing
from saqcli.export.model_metadata import ModelFacts, properties
from saqcli.export.onnx_helpers import clip
from saqcli.export.operators import frozen_copy

LOWEST, HIGHEST = -128, 127


class TrtExporter:
    """Writes a graph of INT8 Q/DQ nodes without zero points."""

    suffix = ".onnx"
    conditions: tuple[str, ...] = ("H9",)  # TensorRT has no such kernels

    def export(self, model: nn.Module, example: Tensor, path: Path, facts: ModelFacts) -> None:
        """Write ``path``; as ``QdqExporter.export``.

        Raises:
            UnsupportedModel: the model cannot be traced, or a weight has codes beyond INT8.
        """
        model_graph = tracing.onnx_graph(frozen_copy(model), example)
        graph = model_graph.graph
        onnx_helpers.merge_inputs(graph)
        onnx_helpers.fold_norms(graph)
        onnx_helpers.split_bias(graph)
        onnx_helpers.lower(graph, "QuantizeInput", _quantize_input)
        onnx_helpers.lower(graph, "DequantizeWeight", _dequantize_weight)
        tracing.save(model_graph, path, properties(facts), facts.saq_version)


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
    if all(_can_be_set_right(product, node) for product in products):
        pads: list[int] = []
        for product in products:
            pads = _pads(product) if len(products) == 1 else []
            x = _padded(graph, node, product, x) if any(pads) else x
            _set_right(graph, product, offset)
        moved = onnx_helpers.before(graph, node, "Sub", [x, _named(graph, node, offset)])
        return _codes_and_back(graph, node, moved, step, LOWEST - lowest, pads)
    moved = onnx_helpers.before(graph, node, "Sub", [x, _named(graph, node, offset)])
    back = _codes_and_back(graph, node, moved, step, LOWEST - lowest)
    return onnx_helpers.before(graph, node, "Add", [back, _named(graph, node, offset)])


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
    codes = onnx_helpers.before(graph, node, "QuantizeLinear", [x, step, zero])
    onnx_helpers.note(codes, **{onnx_helpers.ZERO: str(moved)})
    if any(pads):
        onnx_helpers.note(codes, **{onnx_helpers.PADS: ",".join(map(str, _both_ends(pads)))})
    return onnx_helpers.before(graph, node, "DequantizeLinear", [codes, step, zero])


def _pads(product: ir.Node) -> list[int]:
    return [int(pad) for pad in product.attributes["pads"].as_ints()] if "pads" in product.attributes else []


def _can_be_set_right(product: ir.Node, node: ir.Node) -> bool:
    """Whether an offset of the input becomes a constant for each output channel."""
    alone = len(onnx_helpers.consumers(node.outputs[0])) == 1
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
    return product.inputs[0] is node.outputs[0] and (alone or not any(_pads(product)))


def _both_ends(pads: Sequence[int]) -> list[int]:
    """Pads of a convolution as those of a tensor (N, C, ...)."""
    half = len(pads) // 2
    return [0, 0, *pads[:half], 0, 0, *pads[half:]]


def _padded(graph: ir.Graph, node: ir.Node, product: ir.Node, x: ir.Value) -> ir.Value:
    """Pad with zeros in front of the quantizer what the convolution would have padded behind it."""
    pads = _pads(product)
    amounts = _both_ends(pads)
    node.outputs[0].shape = None  # the codes are those of a larger image now
    product.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
    constant = onnx_helpers.constant(
        graph, f"{onnx_helpers.text(node, 'layer')}.pads", np.array(amounts, np.int64)
    )
    return onnx_helpers.before(graph, node, "Pad", [x, constant], mode="constant")


def _set_right(graph: ir.Graph, product: ir.Node, offset: np.ndarray) -> None:
    """Add, behind the product, what the offset took away: its product with the sums of the weights."""
    weight = onnx_helpers.weight_of(product)
    assert weight is not None
    codes, step = (onnx_helpers.array_of(value).astype(np.float64) for value in weight.inputs)
    dim = max(onnx_helpers.number(weight, "dim"), 0)
    sums = codes.sum(axis=tuple(d for d in range(codes.ndim) if d != dim)) * step * float(offset)
    shape = (1, -1, *(1,) * (codes.ndim - 2)) if product.op_type == "Conv" else (-1,)
    name = f"{onnx_helpers.text(weight, 'layer')}.offset"
    onnx_helpers.add_behind(
        graph, product, onnx_helpers.constant(graph, name, sums.astype(np.float32).reshape(shape))
    )


def _dequantize_weight(graph: ir.Graph, node: ir.Node) -> ir.Value:
    codes = onnx_helpers.array_of(node.inputs[0])
    if codes.dtype != np.int8:
        raise UnsupportedModel(
            f"style trt has INT8 weights only, and the codes of {onnx_helpers.text(node, 'layer')} reach "
            f"{int(codes.max())}: choose another `style`, or quantize with `quantization.weight_grid=auto`"
        )
    return onnx_helpers.weight(graph, node, codes, ir.DataType.INT8)
