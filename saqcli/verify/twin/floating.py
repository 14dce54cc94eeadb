"""Operators that ONNX Runtime computes in floating point, and whether their results are certain to the last bit.

Operators on single values, and those that move values, are: IEEE arithmetic leaves no choice. Sums are not: the order
of their terms depends on kernel and processor. Nor are approximations of functions.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from saqcli.errors import UnsupportedModel
from saqcli.verify.twin.graph import DEQUANTIZE, QUANTIZE, Graph, Node
from saqcli.verify.twin.products import padded_input
from saqcli.verify.twin.reference import reference
from saqcli.verify.twin.rounding import quantize
from saqcli.verify.twin.windows import average, maximum, windows_of

CERTAIN = {
    *(QUANTIZE, DEQUANTIZE, "Identity", "Cast", "Shape", "Constant", "ConstantOfShape"),
    *(
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Neg",
        "Abs",
        "Sqrt",
        "Reciprocal",
        "Max",
        "Min",
        "Relu",
        "Clip",
        "LeakyRelu",
    ),
    *("Round", "Floor", "Ceil", "Sign", "Where", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"),
    *(
        "And",
        "Or",
        "Not",
        "MaxPool",
        "GlobalMaxPool",
        "ReduceMax",
        "ReduceMin",
        "Concat",
        "Split",
        "Slice",
        "Pad",
    ),
    *(
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Tile",
        "Gather",
        "GatherElements",
    ),
    *("DepthToSpace", "SpaceToDepth", "Range", "Mod"),
}


def evaluate(graph: Graph, node: Node, values: list[Any]) -> list[Any]:
    """The outputs of a standard operator.

    Raises:
        UnsupportedModel: ONNX's reference implementation does not know it either.
    """
    own = _OWN.get(node.op)
    if own is not None and not node.more_outputs:
        return [own(node, values)]
    try:
        return reference(node.proto, values, graph.opset)
    except Exception as error:  # anything may be in a file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnsupportedModel(f"the twin cannot compute {node.op} at {node.name}: {reason}") from None


def quantize_linear(graph: Graph, node: Node, values: list[Any]) -> Any:
    """QuantizeLinear to 8 bits per tensor as MLAS rounds it; other types by the reference implementation."""
    scale = graph.scale(node)
    dtype = values[2].dtype if len(values) > 2 and values[2] is not None else np.dtype(np.uint8)
    if scale is None or not scale.per_tensor or dtype not in (np.dtype(np.uint8), np.dtype(np.int8)):
        return reference(node.proto, values, graph.opset)[0]
    ends = (0, 255) if dtype == np.uint8 else (-128, 127)
    step = np.float32(scale.step.reshape(-1)[0])
    return quantize(values[0], step, scale.zero.reshape(-1)[0], ends).astype(dtype)


def dequantize_linear(graph: Graph, node: Node, values: list[Any]) -> Any:
    """DequantizeLinear in float32: ``(code - zero) * step``."""
    scale = graph.scale(node)
    if scale is None:
        return reference(node.proto, values, graph.opset)[0]
    codes = values[0].astype(np.int32)
    if scale.axis is None:
        return (codes - scale.zero.reshape(-1)[0]).astype(np.float32) * np.float32(scale.step.reshape(-1)[0])
    shape = [-1 if dim == scale.axis % codes.ndim else 1 for dim in range(codes.ndim)]
    return (codes - scale.zero.reshape(shape)).astype(np.float32) * scale.step.reshape(shape)


def _conv(node: Node, values: list[Any]) -> Any:
    x, weight = (torch.from_numpy(np.ascontiguousarray(each)) for each in values[:2])
    bias = torch.from_numpy(values[2]) if len(values) > 2 and values[2] is not None else None
    windows = windows_of(node, tuple(x.shape[2:]), tuple(weight.shape[2:]))
    operator = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    groups = int(node.attribute("group", 1))
    with torch.no_grad():
        padded = padded_input(x, windows)
        return operator(padded, weight, bias, windows.strides, 0, windows.dilations, groups).numpy()


def _gemm(node: Node, values: list[Any]) -> Any:
    a, b = values[0], values[1]
    a = a.T if node.attribute("transA", 0) else a
    b = b.T if node.attribute("transB", 0) else b
    product = np.float32(node.attribute("alpha", 1.0)) * (a @ b)
    if len(values) > 2 and values[2] is not None:
        product = product + np.float32(node.attribute("beta", 1.0)) * values[2]
    return product.astype(np.float32)


def _clip(node: Node, values: list[Any]) -> Any:
    low, high = (*values[1:], None, None)[:2]
    x = values[0] if low is None else np.maximum(values[0], low)
    return x if high is None else np.minimum(x, high)


_OWN: dict[str, Callable[[Node, list[Any]], Any]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": lambda node, values: np.matmul(*values),
    "MaxPool": lambda node, values: maximum(node, values[0]),
    "AveragePool": lambda node, values: average(node, values[0]),
    "GlobalAveragePool": lambda node, values: values[0].mean(
        tuple(range(2, values[0].ndim)), dtype=np.float32, keepdims=True
    ),
    "Clip": _clip,
    "Relu": lambda node, values: np.maximum(values[0], values[0].dtype.type(0)),
    "Add": lambda node, values: values[0] + values[1],
    "Sub": lambda node, values: values[0] - values[1],
    "Mul": lambda node, values: values[0] * values[1],
}
