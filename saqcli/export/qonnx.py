"""Style ``qonnx``: IntQuant nodes, for FINN, hls4ml and QONNX tools.

The true bit-width is an input of the node. The file contains the operator as a function of standard operators, so ONNX
Runtime runs it too. Weights are floating-point constants in front of their quantizer, as the format requires. The
paper's grid, odd codes ``2 h + 1`` in units of ``s``, is ``b`` bits at scale ``2 s`` with zero point -1/2; an
asymmetric range is unsigned, with a zero point of each channel.
"""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from saqcli.export import onnx_helpers, tracing
from saqcli.export.style import OnnxStyle, Reader, scaled_values

QONNX, INT_QUANT = "qonnx.custom_op.general", "IntQuant"


class QonnxExporter(OnnxStyle):
    """Writes a graph of IntQuant nodes."""

    name, description = "qonnx", "IntQuant nodes"
    quantizers: Mapping[str, Reader] = {INT_QUANT: scaled_values}
    containers = ("FLOAT",)
    opsets: Mapping[str, int] = {QONNX: 1}

    def lower(self, model: ir.Model) -> None:
        """Replace all placeholders by IntQuant, and add its function."""
        super().lower(model)
        function = ir.serde.deserialize_function(_definition())
        model.functions[function.identifier()] = function

    def prepare(self, graph: ir.Graph) -> None:
        """Change nothing: tools for QONNX merge and fold themselves."""

    def quantize_input(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        """IntQuant of the input."""
        return _quantize_input(graph, node)

    def dequantize_weight(self, graph: ir.Graph, node: ir.Node) -> ir.Value:
        """IntQuant of a float constant."""
        return _quantize_weight(graph, node)


def _quantize_input(graph: ir.Graph, node: ir.Node) -> ir.Value:
    x, step = node.inputs
    assert x is not None
    assert step is not None
    return _int_quant(
        graph, node, x, step, onnx_helpers.number(node, "lowest"), onnx_helpers.number(node, "highest"), 0.0
    )


def _quantize_weight(graph: ir.Graph, node: ir.Node) -> ir.Value:
    layer, bits = onnx_helpers.text(node, "layer"), onnx_helpers.number(node, "bits")
    codes = onnx_helpers.array_of(node.inputs[0])
    step = onnx_helpers.shaped_step(node)
    weight = onnx_helpers.constant(graph, f"{layer}.weight", codes.astype(np.float32) * step)
    highest = 2 ** (bits - 1) - 1
    if onnx_helpers.number(node, "shifted"):
        scale = onnx_helpers.constant(graph, f"{layer}.scale", step)
        zero = onnx_helpers.zero_points(node).astype(np.float32).reshape(np.shape(step))
        point = onnx_helpers.constant(graph, f"{layer}.zero_point", zero)
        return _node(graph, node, [weight, scale, point], bits, signed=False, narrow=False)
    if codes.size and (codes % 2 == 1).all() and int(np.abs(codes.astype(int)).max()) <= 2**bits - 1:
        scale = onnx_helpers.constant(graph, f"{layer}.scale", np.float32(2) * step)
        return _int_quant(graph, node, weight, scale, -highest - 1, highest, -0.5)
    lowest = -highest if bits == 8 else -highest - 1
    return _int_quant(
        graph, node, weight, onnx_helpers.constant(graph, f"{layer}.scale", step), lowest, highest, 0.0
    )


def _int_quant(
    graph: ir.Graph, node: ir.Node, x: ir.Value, scale: ir.Value, lowest: int, highest: int, zero: float
) -> ir.Value:
    """IntQuant with codes from ``lowest`` to ``highest``; unsigned codes start at 0, with a zero point."""
    bits = (highest - lowest).bit_length()
    signed = highest == 2 ** (bits - 1) - 1
    point = zero if signed else float(-lowest)
    constant = onnx_helpers.constant(graph, f"zero_point_{point:g}", np.float32(point))
    return _node(graph, node, [x, scale, constant], bits, signed=signed, narrow=lowest == -highest)


def _node(
    graph: ir.Graph, node: ir.Node, inputs: list[ir.Value], bits: int, *, signed: bool, narrow: bool
) -> ir.Value:
    """IntQuant of a tensor with its scale and zero point."""
    new = ir.node(
        INT_QUANT,
        [*inputs, onnx_helpers.constant(graph, f"bits_{bits}", np.float32(bits))],
        domain=QONNX,
        attributes={"signed": int(signed), "narrow": int(narrow), "rounding_mode": "ROUND"},
    )
    onnx_helpers.annotate(new, node)
    graph.insert_before(node, new)
    return new.outputs[0]


def _definition() -> onnx.FunctionProto:
    """IntQuant in standard operators, for runtimes without it: (round(clip(x / s + z)) - z) * s."""

    def attribute(name: str) -> onnx.NodeProto:
        node = helper.make_node("Constant", [], [f"{name}_int"])
        reference = onnx.AttributeProto(name="value_int", ref_attr_name=name, type=onnx.AttributeProto.INT)
        node.attribute.append(reference)
        return node

    def number(name: str, value: float) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value_float=value)

    def call(op_type: str, inputs: str, output: str, **attributes: int) -> onnx.NodeProto:
        return helper.make_node(op_type, inputs.split(), [output], **attributes)

    nodes = [
        attribute("signed"),
        attribute("narrow"),
        call("Cast", "signed_int", "signed_float", to=onnx.TensorProto.FLOAT),
        call("Cast", "narrow_int", "narrow_float", to=onnx.TensorProto.FLOAT),
        number("one", 1.0),
        number("two", 2.0),
        call("Sub", "bitwidth signed_float", "exponent"),
        call("Pow", "two exponent", "power"),
        call("Sub", "one signed_float", "unsigned"),
        call("Mul", "unsigned narrow_float", "less"),
        call("Sub", "power one", "top"),
        call("Sub", "top less", "highest"),
        call("Sub", "narrow_float power", "bottom"),
        call("Mul", "bottom signed_float", "lowest"),
        call("Div", "x scale", "units"),
        call("Add", "units zeropt", "shifted"),
        call("Max", "shifted lowest", "above"),
        call("Min", "above highest", "clipped"),
        call("Round", "clipped", "codes"),
        call("Sub", "codes zeropt", "centred"),
        call("Mul", "centred scale", "y"),
    ]
    return helper.make_function(
        QONNX,
        INT_QUANT,
        ["x", "scale", "zeropt", "bitwidth"],
        ["y"],
        nodes,
        [helper.make_opsetid("", tracing.OPSET)],
        ["signed", "narrow", "rounding_mode"],
    )
