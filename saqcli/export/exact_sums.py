"""What keeps a graph of a model with short steps exact in every runtime.

Sums of products are exact whoever computes them (``quant.short_steps``). Four things are not, and are changed:

    means          runtimes divide by the number of values or multiply by its reciprocal: ReduceSum and Div
    additions      of two branches may need more than 24 bits. A single addition is rounded to the same number
                   everywhere, but ONNX Runtime fuses it into the convolution before it, whose partial sums are then
                   rounded: a Clip that clips nothing lies in between, and becomes the convolution's activation
    junctions      ONNX Runtime runs an addition or a pool between quantizers in an integer kernel, which rescales by a
                   rounded product: a Max that changes nothing, or the ReLU written as one, keeps it in floating point
    integers       kernels between two 8-bit quantizers rescale in the same way: ``integer_kernels`` is not used
"""

import numpy as np
import onnx_ir as ir

from saqcli.export import onnx_helpers
from saqcli.export.tracing import OUTPUT

_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LARGEST = np.finfo(np.float32).max


def divide_sums(graph: ir.Graph) -> None:
    """Write means over positions as ReduceSum and Div."""
    for node in [node for node in graph if node.op_type in ("GlobalAveragePool", "ReduceMean")]:
        x, output = node.inputs[0], node.outputs[0]
        shape = None if x is None else x.shape
        if x is None or shape is None or len(shape) < 3:
            continue
        axes = list(range(2, len(shape)))
        keep = 1
        if node.op_type == "ReduceMean":
            given = onnx_helpers.array_of(node.inputs[1]) if len(node.inputs) > 1 else None
            if given is None or sorted(int(d) % len(shape) for d in given) != axes:
                continue
            keep = node.attributes["keepdims"].as_int() if "keepdims" in node.attributes else 1
        sizes = [shape[d] for d in axes]
        if not all(isinstance(size, int) for size in sizes):
            continue
        name = node.name or output.name or "mean"
        over = onnx_helpers.constant(graph, f"{name}.axes", np.array(axes, np.int64))
        count = onnx_helpers.constant(graph, f"{name}.count", np.float32(np.prod(sizes)))
        total = ir.node("ReduceSum", [x, over], attributes={"keepdims": keep})
        total.outputs[0].type, total.outputs[0].shape = output.type, output.shape
        graph.insert_before(node, total)
        mean = onnx_helpers.insert_before(graph, node, "Div", [total.outputs[0], count])
        mean.type, mean.shape = output.type, output.shape
        output.replace_all_uses_with(mean, replace_graph_outputs=True)
        if output.name == OUTPUT:
            output.name, mean.name = f"{OUTPUT}_of_mean", OUTPUT
        graph.remove(node, safe=True)


def separate_additions(graph: ir.Graph) -> None:
    """Put a Clip that clips nothing between a product with its bias and the addition of another branch."""
    for node in [node for node in graph if node.op_type == "Add"]:
        if any(value is None or onnx_helpers.array_of(value) is not None for value in node.inputs):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or not _is_product(value):
                continue
            name = node.name or "sum"
            ends = [
                onnx_helpers.constant(graph, f"{name}.{end}", np.float32(number))
                for end, number in (("least", -_LARGEST), ("most", _LARGEST))
            ]
            apart = onnx_helpers.insert_before(graph, node, "Clip", [value, *ends])
            apart.type, apart.shape = value.type, value.shape
            node.replace_input_with(index, apart)


def keep_in_float(graph: ir.Graph) -> None:
    """Put a Max between an addition or a pool of quantized tensors and the quantizer that alone reads it."""
    for node in [node for node in graph if node.op_type in ("Add", "AveragePool")]:
        result, readers = node.outputs[0], onnx_helpers.consumers(node.outputs[0])
        if len(readers) != 1 or not all(_is_quantized(value) for value in node.inputs):
            continue
        reader = readers[0]
        if reader.op_type not in ("Relu", "QuantizeInput"):
            continue
        least = np.float32(0 if reader.op_type == "Relu" else -_LARGEST)
        end = onnx_helpers.constant(graph, f"{node.name or 'sum'}.kept", least)
        kept = onnx_helpers.insert_before(graph, reader, "Max", [result, end])
        kept.type, kept.shape = result.type, result.shape
        if reader.op_type == "Relu":
            reader.outputs[0].replace_all_uses_with(kept)
            graph.remove(reader, safe=True)
        else:
            reader.replace_input_with(0, kept)


def _is_quantized(value: ir.Value | None) -> bool:
    """Whether a tensor is that of a quantizer."""
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "QuantizeInput"


def _is_product(value: ir.Value) -> bool:
    """Whether a tensor is a product, or one plus a constant."""
    producer = value.producer()
    if producer is None:
        return False
    if producer.op_type == "Add":
        return any(
            each is not None and onnx_helpers.array_of(each) is not None for each in producer.inputs
        ) and any(each is not None and _is_product(each) for each in producer.inputs)
    return producer.op_type in _PRODUCTS
