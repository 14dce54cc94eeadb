"""Preparation of 8-bit layers for ONNX Runtime's integer kernels.

A product between full 8-bit tensors, whose bias is an int32 in units of their scales,

    Q DQ -- Conv -- (Relu) -- Q DQ        weight INT8, bias INT32 behind DequantizeLinear

becomes one QLinearConv. The bias is rounded to a multiple of input step times weight step, by at most half a unit of
the accumulator. Where this error would be noticeable (few products per sum, as in depthwise layers), and in all other
layers, the bias stays a float Add. Pools and concatenations in between are moved behind the quantizer: quantizing
before them with the same step gives the same codes.
"""

import numpy as np
import onnx_ir as ir

from saqcli.export import onnx_helpers

SAME_CODES = ("Concat", "MaxPool")  # quantizing before it with the same step changes nothing
INT32_MAX = 2**31 - 1
LARGEST_SHIFT = 0.005  # by rounding of the bias, in steps of the quantizer of the layer's output


def prepare_integer_kernels(graph: ir.Graph) -> None:
    """Rewrite ``graph`` for integer kernels; to be called before ``split_bias``."""
    for node in onnx_helpers.placeholders(graph, "QuantizeInput"):
        if _full(node):
            _quantize_before(graph, node)
    for node in onnx_helpers.placeholders(graph, "QuantizeInput"):
        if _full(node):
            _drop_clip(graph, node)
    for node in [node for node in graph if node.op_type in ("Conv", "Gemm")]:
        _round_bias(graph, node)


def _full(node: ir.Node) -> bool:
    return (
        onnx_helpers.number(node, "highest") - onnx_helpers.number(node, "lowest") == onnx_helpers.BYTE_SPAN
    )


def _quantize_before(graph: ir.Graph, node: ir.Node) -> None:
    """Copy the quantizer to the inputs of the pool or concatenation in front of it."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    if (
        producer is None
        or producer.op_type not in SAME_CODES
        or len(onnx_helpers.consumers(producer.outputs[0])) != 1
    ):
        return
    if any(value is None or value.producer() is None for value in producer.inputs):
        return
    for index, value in enumerate(list(producer.inputs)):
        assert value is not None
        copy = ir.Node(
            node.domain,
            node.op_type,
            [value, node.inputs[1]],
            [*node.attributes.values(), ir.AttrInt64(onnx_helpers.COPY, 1)],
        )
        copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
        graph.insert_before(producer, copy)
        producer.replace_input_with(index, copy.outputs[0])
        _quantize_before(graph, copy)


def _drop_clip(graph: ir.Graph, node: ir.Node) -> None:
    """Remove a Clip (ReLU6) in front of a quantizer that saturates at the same codes."""
    clip = node.inputs[0].producer() if node.inputs[0] is not None else None
    if (
        clip is None
        or clip.op_type != "Clip"
        or len(onnx_helpers.consumers(clip.outputs[0])) != 1
        or len(clip.inputs) < 3
    ):
        return
    least, most = (onnx_helpers.array_of(value) for value in clip.inputs[1:3])
    step = float(onnx_helpers.array_of(node.inputs[1]))
    if least is None or most is None:
        return
    ends = np.round(np.array([float(least), float(most)]) / step)
    if ends[0] <= onnx_helpers.number(node, "lowest") and ends[1] >= onnx_helpers.number(node, "highest"):
        node.replace_input_with(0, clip.inputs[0])
        graph.remove(clip, safe=True)


def _round_bias(graph: ir.Graph, node: ir.Node) -> None:
    """Make the bias int32 if the layer will run on integers."""
    weight = onnx_helpers.weight_of(node)
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if weight is None or source is None or source.op_type != "QuantizeInput" or not _full(source):
        return
    codes = onnx_helpers.array_of(weight.inputs[0])
    if codes.dtype != np.int8 or onnx_helpers.fits_int4(codes) or onnx_helpers.needs_zero_points(weight):
        return
    reader = _quantizer_after(node.outputs[0])
    bias = onnx_helpers.array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None or reader is None:
        return
    unit = (
        onnx_helpers.array_of(source.inputs[1]).astype(np.float64) * onnx_helpers.array_of(weight.inputs[1])
    ).astype(np.float32)
    codes = np.round(bias.astype(np.float64) / unit)
    if not np.isfinite(codes).all() or np.abs(codes).max(initial=0) > INT32_MAX:
        return
    error = np.abs(codes * unit - bias).max(initial=0)
    if error > LARGEST_SHIFT * float(onnx_helpers.array_of(reader.inputs[1])):
        return
    layer = onnx_helpers.text(weight, "layer")
    inputs = [
        onnx_helpers.constant(graph, f"{layer}.bias", codes.astype(np.int32)),
        onnx_helpers.constant(graph, f"{layer}.bias_step", unit),
    ]
    axis = {"axis": 0} if unit.ndim else {}
    node.replace_input_with(2, onnx_helpers.insert_before(graph, node, "DequantizeLinear", inputs, **axis))


def _quantizer_after(value: ir.Value) -> ir.Node | None:
    """The full 8-bit quantizer that is the only reader of ``value``, possibly through a ReLU."""
    readers = onnx_helpers.consumers(value)
    if len(readers) != 1:
        return None
    (reader,) = readers
    if reader.op_type == "Relu":
        return _quantizer_after(reader.outputs[0])
    return reader if reader.op_type == "QuantizeInput" and _full(reader) else None
