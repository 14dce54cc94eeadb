"""Helpers of the ONNX styles: placeholders, constants, norms, containers.

Norms are folded into weights, biases separated from products, codes of weights and activations stored in containers;
activations have 8-bit containers, behind a float Clip if the grid is narrower.

Saturation: without VNNI, ONNX Runtime multiplies unsigned by signed bytes with VPMADDUBSW on x86 processors:
neighbouring products are added in 16 bits, and sums above 32767 silently become 32767 (255 * 127 + 255 * 127 = 64770).
Signed activations are first shifted to unsigned ones, so they are affected as well. Weights stored as UINT8 with zero
point 128 use another kernel (VPMADDWD), which is exact on every processor. Depthwise convolutions have a separate
kernel, which is exact too; this is not relied on here. Which products are neighbours depends on the kernel, so the test
considers any two of an output channel.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from saqcli.errors import UnsupportedModel
from saqcli.export.operators import DOMAIN, PER_TENSOR
from saqcli.export.tracing import ANNOTATIONS, OUTPUT
from saqcli.quant.products import split_name

HIGHEST_INPUT = 255  # of an 8-bit activation, shifted to unsigned if signed
INT16_MIN, INT16_MAX = -(2**15), 2**15 - 1
UINT8_ZERO = 128  # zero point of a weight stored as UINT8
UINT4_SPAN = 15  # difference between the ends of a 4-bit container


def may_saturate(codes: Any, dim: int) -> bool:
    """Whether two products of weight codes with 8-bit inputs can exceed 16 bits.

    Args:
        codes: integer weight codes without zero point, in -128 ... 127.
        dim: dimension of the output channels.
    """
    rows = np.moveaxis(np.asarray(codes, np.int32), dim, 0).reshape(codes.shape[dim], -1)
    if rows.shape[1] < 2:
        return False
    highest = np.partition(rows, -2, axis=1)[:, -2:].clip(min=0).sum(1).max()
    lowest = np.partition(rows, 1, axis=1)[:, :2].clip(max=0).sum(1).min()
    return bool(HIGHEST_INPUT * highest > INT16_MAX or HIGHEST_INPUT * lowest < INT16_MIN)


LAYER, OPERAND, BITS = "saq.layer", "saq.operand", "saq.bits"  # annotations of a node
ZERO, PADS = "saq.zero", "saq.pads"  # code of zero and padding, in styles that shift codes
LEVELS = "saq.levels"  # number of levels of a table, at the node that holds their indices
LAYER_SEPARATOR = " "
ORDER = "saq.order"  # position of a quantizer in the traced network, where a style moves quantizers
COPY = "saq.copy"  # marks an additional quantizer, which changes nothing
MULTIPLIERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CONVOLUTIONS = ("Conv", "ConvTranspose")
BYTE_SPAN = 255  # difference between the ends of a full 8-bit range

Lowering = Callable[[ir.Graph, ir.Node], ir.Value]


def placeholders(graph: ir.Graph, *kinds: str) -> list[ir.Node]:
    """The placeholders of the given kinds, in order."""
    return [node for node in graph if node.domain == DOMAIN and node.op_type in kinds]


def lower(graph: ir.Graph, kind: str, how: Lowering) -> None:
    """Replace every placeholder of one kind by the value that ``how`` inserts before it and returns."""
    for node in placeholders(graph, kind):
        output = node.outputs[0]
        value = how(graph, node)
        value.type, value.shape = output.type, output.shape
        output.replace_all_uses_with(value, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def insert_before(
    graph: ir.Graph, node: ir.Node, op_type: str, inputs: list[Any], **attributes: Any
) -> ir.Value:
    """Insert a new node before ``node``, annotated with its layer and bits; return its output."""
    new = ir.node(op_type, inputs, attributes=attributes)
    annotate(new, node)
    graph.insert_before(node, new)
    return new.outputs[0]


def annotate(new: ir.Node, node: ir.Node) -> None:
    """Annotate ``new``, in the metadata of the file, with layer, operand and true bits of a placeholder."""
    if node.domain == DOMAIN:
        operand = "input" if "Input" in node.op_type else "weight"
        facts = {LAYER: text(node, "layer"), OPERAND: operand, BITS: str(number(node, "bits"))}
        new.meta[ANNOTATIONS] = facts | ({COPY: "1"} if COPY in node.attributes else {})


def annotations(node: ir.Node) -> dict[str, str]:
    """The annotations of a node that was inserted for a placeholder; empty for others."""
    return dict(node.meta.get(ANNOTATIONS, {}))


def add_annotations(value: ir.Value, **more: str) -> None:
    """Add annotations to the producer of ``value``."""
    node = value.producer()
    assert node is not None
    node.meta[ANNOTATIONS] = node.meta.get(ANNOTATIONS, {}) | more


def merge_inputs(graph: ir.Graph) -> None:
    """Merge quantizers of the same tensor on the same grid; the annotation then names all their layers."""
    kept: dict[tuple[Any, ...], ir.Node] = {}
    for node in placeholders(graph, "QuantizeInput"):
        grid = tuple(number(node, name) for name in ("lowest", "highest", "bits"))
        first = kept.setdefault((node.inputs[0], float(array_of(node.inputs[1])), *grid), node)
        if first is not node:
            names = dict.fromkeys(f"{text(first, 'layer')} {text(node, 'layer')}".split(LAYER_SEPARATOR))
            first.attributes["layer"] = ir.AttrString("layer", LAYER_SEPARATOR.join(names))
            node.outputs[0].replace_all_uses_with(first.outputs[0])
            graph.remove(node, safe=True)


def number(node: ir.Node, name: str) -> int:
    """An integer attribute."""
    return int(node.attributes[name].as_int())


def text(node: ir.Node, name: str) -> str:
    """A text attribute."""
    return str(node.attributes[name].as_string())


def constant(graph: ir.Graph, name: str, array: Any, dtype: ir.DataType | None = None) -> ir.Value:
    """A new initializer with a unique name."""
    unique, count = name, 0
    while unique in graph.initializers:
        count += 1
        unique = f"{name}_{count}"
    tensor = ir.tensor(np.asarray(array), dtype=dtype, name=unique)
    value = ir.Value(name=unique, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def array_of(value: ir.Value | None) -> Any:
    """The array of a constant, or None if the value is computed."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def set_constant(graph: ir.Graph, node: ir.Node, index: int, array: Any, name: str) -> None:
    """Replace input ``index`` of ``node`` by a new constant."""
    node.replace_input_with(index, constant(graph, name, array))


def weight_of(node: ir.Node) -> ir.Node | None:
    """The weight placeholder of a product, possibly behind transposes, or None."""
    if node.op_type not in MULTIPLIERS:
        return None
    value = node.inputs[1]
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type == "Transpose":
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    found = producer is not None and producer.op_type == "DequantizeWeight" and producer.domain == DOMAIN
    return producer if found else None


def consumers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read ``value``."""
    return [use.node for use in value.uses()]


def fold_norms(graph: ir.Graph, *, keep_containers: bool = True) -> None:
    """Fold every batch norm after a quantized convolution into its bias and its weight's steps.

    Codes stay on their grid. A negative gain flips the sign of a channel's codes, gain zero sets them to zero. A norm
    is not folded if another node reads the convolution, if the weight has another reader, or if a code without a
    negative counterpart would change sign.

    Args:
        graph: with placeholders.
        keep_containers: also leave norms whose folding would move the code -8 to 8, out of a 4-bit container.
    """
    for norm in [node for node in graph if node.op_type == "BatchNormalization"]:
        convolution = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if convolution is None or convolution.op_type not in _CONVOLUTIONS:
            continue
        weight = weight_of(convolution)
        only_reader = len(consumers(convolution.outputs[0])) == 1 and convolution.outputs[0].name != OUTPUT
        if weight is None or not only_reader or len(consumers(weight.outputs[0])) != 1:
            continue
        if _fold(graph, norm, convolution, weight, keep_containers=keep_containers):
            norm.outputs[0].replace_all_uses_with(convolution.outputs[0], replace_graph_outputs=True)
            if norm.outputs[0].name == OUTPUT:
                norm.outputs[0].name, convolution.outputs[0].name = f"{OUTPUT}_of_norm", OUTPUT
            graph.remove(norm, safe=True)


def _fold(
    graph: ir.Graph, norm: ir.Node, convolution: ir.Node, weight: ir.Node, *, keep_containers: bool
) -> bool:
    constants = [array_of(value) for value in norm.inputs[1:5]]
    codes, step = array_of(weight.inputs[0]), array_of(weight.inputs[1])
    bias = array_of(convolution.inputs[2]) if len(convolution.inputs) > 2 else np.zeros(())
    if any(each is None for each in (*constants, codes, step, bias)):
        return False
    gain, offset, mean, variance = (each.astype(np.float64) for each in constants)
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    gain = gain / np.sqrt(variance + epsilon)
    dim = 1 if convolution.op_type == "ConvTranspose" else 0
    if codes.shape[dim] != len(gain):  # groups of a transposed convolution share their steps
        return False
    sign = np.sign(gain).astype(codes.dtype).reshape([-1 if d == dim else 1 for d in range(codes.ndim)])
    if (codes[np.broadcast_to(sign < 0, codes.shape)] == np.iinfo(codes.dtype).min).any():
        return False
    if keep_containers and _leaves_int4(codes, sign):
        return False
    scale = np.where(gain == 0, 1.0, np.abs(gain)) * step.astype(np.float64)
    shift = (bias.astype(np.float64) - mean) * gain + offset
    layer = text(weight, "layer")
    set_constant(graph, weight, 0, codes * sign, f"{layer}.folded_codes")
    set_constant(graph, weight, 1, scale.astype(np.float32), f"{layer}.folded_step")
    weight.attributes["dim"] = ir.AttrInt64("dim", dim)
    convolution.resize_inputs(3)
    convolution.replace_input_with(2, constant(graph, f"{layer}.folded_bias", shift.astype(np.float32)))
    return True


def _leaves_int4(codes: Any, sign: Any) -> bool:
    """Whether the changed signs would move codes out of the 4-bit range."""
    return fits_int4(codes) and not fits_int4(codes * sign)


def fits_int4(codes: Any) -> bool:
    """Whether all codes lie in -8 ... 7."""
    return bool(codes.size and codes.min() >= -8 and codes.max() <= 7)


def packed(codes: Any) -> tuple[Any, ir.DataType]:
    """Weight codes in the smallest container that every runtime supports: INT4, INT8 or INT16."""
    if fits_int4(codes):
        return codes.astype(ml_dtypes.int4), ir.DataType.INT4
    if codes.dtype == np.int8:
        return codes, ir.DataType.INT8
    return codes, ir.DataType.INT16


def packed_safely(node: ir.Node) -> tuple[Any, ir.DataType]:
    """As ``packed``, but in UINT8 if sums of two products with 8-bit codes may exceed 16 bits (hazard H9).

    Codes of asymmetric ranges that fit 4 bits only with zero points are UINT4.
    """
    codes, dtype = packed(array_of(node.inputs[0]))
    if needs_zero_points(node):
        return (codes + _along(zero_points(node), node)).astype(ml_dtypes.uint4), ir.DataType.UINT4
    multiplied = any(_has_codes(product) and product.op_type != "ConvTranspose" for product in products(node))
    dim = max(number(node, "dim"), 0) if "dim" in node.attributes else 0
    if dtype != ir.DataType.INT8 or not multiplied or not may_saturate(codes, dim):
        return codes, dtype
    return packed_unsigned(codes)


def needs_zero_points(node: ir.Node) -> bool:
    """Whether the codes of a weight placeholder fit 4 bits with a zero point of each channel, and not without."""
    if "shifted" not in node.attributes or not number(node, "shifted"):
        return False
    codes = array_of(node.inputs[0]).astype(np.int16)
    if not codes.size or fits_int4(codes):
        return False
    return bool((codes + _along(zero_points(node), node)).max() <= UINT4_SPAN)


def zero_points(node: ir.Node) -> Any:
    """What code 0 of a weight placeholder is stored as, in the shape of its step, so that no code is below 0."""
    codes, dim = array_of(node.inputs[0]).astype(np.int16), number(node, "dim")
    others = tuple(
        d for d in range(codes.ndim) if d != dim
    )  # all of them where the step is that of the tensor
    return -codes.min(axis=others, initial=0)


def _along(values: Any, node: ir.Node) -> Any:
    """``values`` of each channel of a weight placeholder, or of all, shaped to add to its codes."""
    codes, dim = array_of(node.inputs[0]), number(node, "dim")
    return values if dim == PER_TENSOR else values.reshape([-1 if d == dim else 1 for d in range(codes.ndim)])


def packed_unsigned(codes: Any) -> tuple[Any, ir.DataType]:
    """Weight codes in -128 ... 127 as UINT8 with zero point 128."""
    return (codes.astype(np.int16) + UINT8_ZERO).astype(np.uint8), ir.DataType.UINT8


def split_bias(graph: ir.Graph) -> None:
    """Move the bias of every product with a quantized weight into an Add after it (hazard H1)."""
    for node in list(graph):
        biased = node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.inputs) > 2
        if not biased or node.inputs[2] is None or weight_of(node) is None:
            continue
        bias = node.inputs[2]
        if bias.producer() is not None:  # of an integer kernel
            continue
        if node.op_type != "Gemm":
            bias = _shaped(graph, bias, node)
        node.resize_inputs(2)
        add_after(graph, node, bias)


def add_after(graph: ir.Graph, node: ir.Node, summand: ir.Value) -> None:
    """Replace the output of ``node`` by ``Add(output, summand)``."""
    output = node.outputs[0]
    add = ir.node("Add", [output, summand])
    total = add.outputs[0]
    total.type, total.shape = output.type, output.shape
    output.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    if output.name == OUTPUT:
        output.name, total.name = f"{OUTPUT}_without_bias", OUTPUT
    graph.insert_after(node, add)


def _shaped(graph: ir.Graph, bias: ir.Value, node: ir.Node) -> ir.Value:
    """The bias (C,) as a constant (1, C, 1, ...), to add to the output of a convolution."""
    array = array_of(bias)
    weight = weight_of(node)
    if array is None or weight is None:
        raise UnsupportedModel(f"the bias of {node.name} is not a constant: it cannot be exported")
    spatial = array_of(weight.inputs[0]).ndim - 2
    return constant(graph, f"{text(weight, 'layer')}.bias", array.reshape(1, -1, *(1,) * spatial))


def shaped_step(node: ir.Node) -> Any:
    """The step of a weight placeholder, shaped to multiply its codes."""
    codes, step, dim = array_of(node.inputs[0]), array_of(node.inputs[1]), number(node, "dim")
    return step if dim == PER_TENSOR else step.reshape([-1 if d == dim else 1 for d in range(codes.ndim)])


def dequantized(graph: ir.Graph, node: ir.Node, codes: Any, dtype: ir.DataType, step: Any) -> ir.Value:
    """DequantizeLinear of the constant codes of a weight placeholder, with ``step``.

    UINT8 codes are offset by 128, UINT4 codes by the zero points of the channels.
    """
    layer = text(node, "layer")
    zero = None
    if dtype == ir.DataType.UINT4:
        zero = zero_points(node).astype(ml_dtypes.uint4)
        step = np.broadcast_to(step, zero.shape).copy()
    inputs = [constant(graph, f"{layer}.codes", codes, dtype), constant(graph, f"{layer}.step", step)]
    if dtype == ir.DataType.UINT8:
        inputs.append(constant(graph, f"{layer}.zero", np.full(np.shape(step), UINT8_ZERO, np.uint8)))
    if zero is not None:
        inputs.append(constant(graph, f"{layer}.zero", zero, dtype))
    axis = {} if np.ndim(step) == 0 else {"axis": number(node, "dim")}
    return insert_before(graph, node, "DequantizeLinear", inputs, **axis)


def weight(graph: ir.Graph, node: ir.Node, codes: Any, dtype: ir.DataType) -> ir.Value:
    """DequantizeLinear of the ``codes`` of a weight placeholder; inputs must be lowered first."""
    if all(product.op_type in _CONVOLUTIONS or _has_codes(product) for product in products(node)):
        return dequantized(graph, node, codes, dtype, array_of(node.inputs[1]))
    # In a matrix product this pattern would make ONNX Runtime quantize a float input (hazard H2).
    integers = dequantized(graph, node, codes, dtype, np.float32(1))
    scale = constant(graph, f"{text(node, 'layer')}.scale", shaped_step(node))
    return insert_before(graph, node, "Mul", [integers, scale])


def products(node: ir.Node) -> list[ir.Node]:
    """The nodes that multiply with a weight, possibly behind transposes."""
    found = []
    for reader in consumers(node.outputs[0]):
        found += products(reader) if reader.op_type == "Transpose" else [reader]
    return found


def quantizes_product(node: ir.Node) -> bool:
    """Whether an input placeholder quantizes an operand of a product of two activations."""
    names = text(node, "layer").split(LAYER_SEPARATOR)
    return any(split_name(name.rpartition(".")[0])[1] is not None for name in names)


def _has_codes(product: ir.Node) -> bool:
    """Whether the input of a product was quantized."""
    source = product.inputs[0].producer() if product.inputs[0] is not None else None
    return source is not None and source.op_type == "DequantizeLinear"


def quantized(
    graph: ir.Graph, node: ir.Node, *, unsigned: bool = False
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The codes of an input placeholder, its step and its zero point.

    INT8 if the codes are signed and fit, unless ``unsigned``; else UINT8, shifted so that the lowest code is 0. 4-bit
    containers are avoided: with them ONNX Runtime removes a ReLU that is still needed (hazard H4), or fails on a Clip
    (H3).
    """
    x, step = node.inputs
    lowest, highest = number(node, "lowest"), number(node, "highest")
    signed = -128 <= lowest < 0 and highest <= 127 and not unsigned
    zero = np.array(0 if signed else -lowest, np.int8 if signed else np.uint8)
    name = f"{text(node, 'layer')}.input"
    assert x is not None
    assert step is not None
    clipped = clip(graph, node, x, lowest, highest) if highest - lowest < BYTE_SPAN else x
    offset = constant(graph, f"{name}.zero", zero)
    return insert_before(graph, node, "QuantizeLinear", [clipped, step, offset]), step, offset


def on_levels(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """The values of a placeholder of an input on a table of levels, in standard operators.

    A binary search over the edges between levels, one Gather, Greater and Where for each bit, gives the index of the
    nearest level, a Gather its value: comparisons and look-ups of float32 numbers, which are exact in every runtime.
    The last Where holds the indices; it alone has the annotations of a quantizer.
    """
    x, step, levels = node.inputs
    assert x is not None
    unit, codes = array_of(step), array_of(levels).astype(np.float32)
    name = f"{text(node, 'layer')}.input"
    rounds = max(1, int(len(codes) - 1).bit_length())
    edges = np.full(2**rounds, np.inf, np.float32)
    edges[1 : len(codes)] = (codes[1:] + codes[:-1]) / np.float32(2)  # edges[i]: between levels i - 1 and i
    table = constant(graph, f"{name}.edges", edges)

    def number_of(value: int) -> ir.Value:
        return constant(graph, f"{name}.index", np.int64(value))

    scaled = insert_before(graph, node, "Div", [x, step])
    index: ir.Value = number_of(0)
    inner = [scaled]
    for bit in reversed(range(rounds)):
        first = bit == rounds - 1
        further = (
            number_of(2**bit) if first else insert_before(graph, node, "Add", [index, number_of(2**bit)])
        )
        edge = insert_before(graph, node, "Gather", [table, further])
        above = insert_before(graph, node, "Greater", [scaled, edge])
        index = insert_before(graph, node, "Where", [above, further, index])
        inner += [edge, above, index] if first else [further, edge, above, index]
    for value in inner[:-1]:
        producer = value.producer()
        assert producer is not None
        del producer.meta[ANNOTATIONS][OPERAND]
    add_annotations(index, **{LEVELS: str(len(codes))})
    values = constant(graph, f"{name}.levels", codes * unit.astype(np.float32))
    return insert_before(graph, node, "Gather", [values, index])


def clip(graph: ir.Graph, node: ir.Node, x: ir.Value, lowest: int, highest: int) -> ir.Value:
    """``x`` limited to the values of two codes of an input placeholder."""
    unit = array_of(node.inputs[1])
    name = f"{text(node, 'layer')}.input"
    ends = [
        constant(graph, f"{name}.{end}", unit * np.float32(code))
        for end, code in (("least", lowest), ("most", highest))
    ]
    return insert_before(graph, node, "Clip", [x, *ends])
