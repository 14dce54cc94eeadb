"""Graphs of integers: a traced network arranged so that a runtime needs no float tensor between two layers.

ONNX Runtime runs an operator on integers where all its operands come from DequantizeLinear and its only reader is a
QuantizeLinear. What stands in between in a traced network is moved or merged here, on placeholders, without changing
the function:

    Pad -- Conv                       padding becomes that of the convolution
    ReduceMean over space             GlobalAveragePool -- Flatten
    Transpose(weight) -- MatMul -- Add(bias)     Reshape -- Gemm -- Reshape, whose bias is that of a layer
    MaxPool, Concat, Reshape ... -- Q            Q -- MaxPool ... -- Q, with the same step: it only moves codes
    ReLU, Clip -- Q                   Q, with a narrower range of codes: rounding to the grid is monotone
    HardSigmoid -- Q                  Add -- Q (``gates``)

The bias of every layer is an INT32 in units of input step times weight step, the unit of its accumulator. This changes
the function by up to half a unit; ``bias`` does the same to the PyTorch model that a file is compared with.
"""

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from saqcli.export import onnx_helpers
from saqcli.export.integer import gates
from saqcli.export.integer.bias import grid_bias
from saqcli.export.onnx_helpers import array_of, consumers, number, placeholders

# Operators that move codes and change none. Pad inserts zeros, which have a code.
MOVES_CODES = (
    *("Concat", "Flatten", "MaxPool", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose"),
    "Unsqueeze",
)
LEAST, MOST = (
    "least",
    "most",
)  # attributes of an input placeholder: range of codes that can occur, if narrower
WITHIN, ANOTHER = "within", "another"  # attributes: its input has codes of the same grid, or of another one
_QUANTIZER = "QuantizeInput"


def absorb_pads(graph: ir.Graph) -> None:
    """Give convolutions the padding with zeros in front of them."""
    for pad in [node for node in graph if node.op_type == "Pad"]:
        readers = consumers(pad.outputs[0])
        amounts = _zero_padding(pad)
        if amounts is None or len(readers) != 1 or readers[0].op_type != "Conv":
            continue
        (convolution,) = readers
        half = len(amounts) // 2
        before, after = amounts[:half], amounts[half:]
        unpadded = "auto_pad" in convolution.attributes and convolution.attributes[
            "auto_pad"
        ].as_string() not in (
            "NOTSET",
            "VALID",
        )
        if unpadded or any(before[:2]) or any(after[:2]) or convolution.inputs[0] is not pad.outputs[0]:
            continue
        own = _ints(convolution, "pads") or [0] * (2 * (half - 2))
        total = [a + b for a, b in zip(own, [*before[2:], *after[2:]], strict=True)]
        convolution.attributes["pads"] = ir.AttrInt64s("pads", total)
        convolution.replace_input_with(0, pad.inputs[0])
        graph.remove(pad, safe=True)


def _zero_padding(pad: ir.Node) -> list[int] | None:
    """The amounts of a padding with zeros, before and after every dimension, or None."""
    mode = pad.attributes["mode"].as_string() if "mode" in pad.attributes else "constant"
    amounts = array_of(pad.inputs[1])
    value = array_of(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else np.float32(0)
    axes = len(pad.inputs) > 3 and pad.inputs[3] is not None
    if mode != "constant" or amounts is None or value is None or axes or np.any(value) or (amounts < 0).any():
        return None
    return [int(each) for each in amounts]


def _ints(node: ir.Node, name: str) -> list[int]:
    return [int(each) for each in node.attributes[name].as_ints()] if name in node.attributes else []


def use_global_pools(graph: ir.Graph) -> None:
    """Write means over both spatial dimensions as GlobalAveragePool."""
    for mean in [node for node in graph if node.op_type == "ReduceMean"]:
        x = mean.inputs[0]
        axes = array_of(mean.inputs[1]) if len(mean.inputs) > 1 else _ints(mean, "axes")
        if x is None or x.shape is None or len(x.shape) != 4 or axes is None:
            continue
        if sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        new = [ir.node("GlobalAveragePool", [x])]
        kept = x.shape[:2]
        new[0].outputs[0].type, new[0].outputs[0].shape = mean.outputs[0].type, ir.Shape([*kept, 1, 1])
        if "keepdims" in mean.attributes and not number(mean, "keepdims"):
            new.append(ir.node("Flatten", [new[0].outputs[0]], attributes={"axis": 1}))
        _replace(graph, mean, new)


def _replace(graph: ir.Graph, node: ir.Node, new: list[ir.Node]) -> None:
    """Replace ``node`` by a chain of nodes, whose last output takes its place."""
    output, last = node.outputs[0], new[-1].outputs[0]
    last.type, last.shape = output.type, output.shape
    graph.insert_before(node, new)
    output.replace_all_uses_with(last, replace_graph_outputs=True)
    name, output.name = output.name, f"{output.name}_replaced"
    last.name = name
    graph.remove(node, safe=True)


def use_static_shapes(graph: ir.Graph) -> None:
    """Give every Reshape that keeps the batch a constant shape: computed ones hide that codes only move."""
    for node in [node for node in graph if node.op_type == "Reshape"]:
        x, output = node.inputs[0], node.outputs[0]
        if x is None or x.shape is None or output.shape is None or array_of(node.inputs[1]) is not None:
            continue
        before, after = list(x.shape), list(output.shape)
        if len(after) < 2 or not before or isinstance(after[0], int) or before[0] != after[0]:
            continue
        if all(isinstance(size, int) for size in after[1:]):
            onnx_helpers.set_constant(
                graph, node, 1, np.array([-1, *after[1:]], np.int64), f"{output.name}.shape"
            )


def use_gemms(graph: ir.Graph) -> None:
    """Write linear layers over tokens, (..., C), as Gemm over (N, C), whose bias can be an integer."""
    for product in [node for node in graph if node.op_type == "MatMul"]:
        x, weight = product.inputs[0], onnx_helpers.weight_of(product)
        transpose = product.inputs[1].producer() if product.inputs[1] is not None else None
        if (
            x is None
            or x.shape is None
            or weight is None
            or transpose is None
            or transpose.op_type != "Transpose"
        ):
            continue
        sizes = list(x.shape)
        if transpose.inputs[0] is not weight.outputs[0] or not all(
            isinstance(size, int) for size in sizes[1:]
        ):
            continue
        outputs = len(array_of(weight.inputs[0]))
        bias = _added_vector(product, outputs)
        layer, last = onnx_helpers.text(weight, "layer"), product if bias is None else bias[0]
        rows, tokens = (
            onnx_helpers.constant(graph, f"{layer}.{name}", np.array([-1, *shape], np.int64))
            for name, shape in (("rows", sizes[-1:]), ("tokens", [*sizes[1:-1], outputs]))
        )
        flat = ir.node("Reshape", [x, rows])
        inputs = [flat.outputs[0], transpose.inputs[0], *([] if bias is None else [bias[1]])]
        gemm = ir.node("Gemm", inputs, attributes={"alpha": 1.0, "beta": 1.0, "transB": 1}, name=product.name)
        for value in (flat.outputs[0], gemm.outputs[0]):
            value.type = x.type
        _replace(graph, last, [flat, gemm, ir.node("Reshape", [gemm.outputs[0], tokens])])
        if last is not product:
            graph.remove(product, safe=True)


def _added_vector(product: ir.Node, size: int) -> tuple[ir.Node, ir.Value] | None:
    """The addition of a constant vector that is the only reader of a product, and the vector."""
    readers = consumers(product.outputs[0])
    if len(readers) == 1 and readers[0].op_type == "Add":
        for value in readers[0].inputs:
            array = array_of(value)
            if value is not None and array is not None and array.shape == (size,):
                return readers[0], value
    return None


def move_quantizers(graph: ir.Graph) -> None:
    """Copy every quantizer to the tensors before operators that only move codes.

    Where such a tensor has a quantizer with the same step and grid, its codes are used instead of a copy.
    """
    for node in reversed(placeholders(graph, _QUANTIZER)):
        _move(graph, node)


def _move(graph: ir.Graph, node: ir.Node) -> None:
    x = node.inputs[0]
    producer = x.producer() if x is not None else None
    if producer is None or producer.op_type not in MOVES_CODES or producer.domain or len(consumers(x)) != 1:
        return
    if len(producer.outputs) != 1 or (producer.op_type == "Pad" and _zero_padding(producer) is None):
        return
    places = [
        (index, value)
        for index, value in enumerate(producer.inputs[: None if producer.op_type == "Concat" else 1])
        if value is not None
    ]
    if any(value.producer() is None or _quantized(value) for _, value in places):
        return
    for index, value in places:
        same = next((each for each in consumers(value) if _same_grid(each, node)), None)
        if same is None:
            same = _copy(node, value)
            graph.insert_after(value.producer(), same)
            producer.replace_input_with(index, same.outputs[0])
            _move(graph, same)
        else:
            graph.remove(same)  # it may stand behind the operator
            graph.insert_after(value.producer(), same)
            producer.replace_input_with(index, same.outputs[0])


def _quantized(value: ir.Value) -> bool:
    """Whether a tensor has codes already, possibly moved ones."""
    producer = value.producer()
    while producer is not None and producer.op_type in MOVES_CODES and producer.op_type != "Concat":
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    return producer is not None and producer.op_type == _QUANTIZER


def _same_grid(one: ir.Node, other: ir.Node) -> bool:
    return (
        one.op_type == other.op_type == _QUANTIZER
        and one.inputs[1] is not None
        and float(array_of(one.inputs[1])) == float(array_of(other.inputs[1]))
        and all(number(one, name) == number(other, name) for name in ("lowest", "highest"))
    )


def close_moves(graph: ir.Graph) -> None:
    """Quantize tensors once more that were only moved since, for each operator that reads them.

    ONNX Runtime does the same for most operators, but not for all, and other runtimes do not.
    """
    for node in [node for node in graph if node.op_type in MOVES_CODES and not node.domain]:
        value = node.outputs[0]
        source = source_of(value)
        readers = [each for each in consumers(value) if each.op_type not in (*MOVES_CODES, _QUANTIZER)]
        if source is None or not readers or len(node.outputs) != 1 or node.op_type == "Pad":
            continue
        copy = _copy(source, value)
        graph.insert_after(node, copy)
        for reader in readers:
            for index, each in enumerate(list(reader.inputs)):
                if each is value:
                    reader.replace_input_with(index, copy.outputs[0])


def _copy(node: ir.Node, value: ir.Value) -> ir.Node:
    """A copy of a quantizer for another tensor."""
    kept = [each for name, each in node.attributes.items() if name != onnx_helpers.COPY]
    copy = ir.Node(
        node.domain,
        node.op_type,
        [value, node.inputs[1]],
        [*kept, ir.AttrInt64(onnx_helpers.COPY, 1)],
    )
    copy.outputs[0].type, copy.outputs[0].shape = value.type, value.shape
    return copy


def narrow_ranges(graph: ir.Graph) -> None:
    """Remove every ReLU and Clip that only a quantizer reads; the quantizer limits its codes instead."""
    for node in placeholders(graph, _QUANTIZER):
        lowest, highest = number(node, "lowest"), number(node, "highest")
        step = array_of(node.inputs[1]).astype(np.float32)
        least, most = lowest, highest
        while True:
            x = node.inputs[0]
            limit = x.producer() if x is not None else None
            bounds = None if limit is None or len(consumers(x)) != 1 else _bounds(limit)
            if limit is None or bounds is None:
                break
            below, above = (np.round(np.float32(bound) / step) for bound in bounds)
            # applied to values limited already, so a later bound wins
            least = int(np.clip(np.clip(below, lowest, highest), least, most))
            most = int(np.clip(np.clip(above, lowest, highest), least, most))
            node.replace_input_with(0, limit.inputs[0])
            graph.remove(limit, safe=True)
        if (least, most) != (lowest, highest):
            node.attributes[LEAST], node.attributes[MOST] = (
                ir.AttrInt64(LEAST, least),
                ir.AttrInt64(MOST, most),
            )


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """The bounds of a ReLU or Clip, or None."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    ends = [array_of(value) if value is not None else None for value in node.inputs[1:3]]
    given = [value is not None for value in node.inputs[1:3]]
    if any(there and end is None for there, end in zip(given, ends, strict=True)):
        return None
    ends += [None] * (2 - len(ends))
    least, most = (
        -np.inf if ends[0] is None else float(ends[0]),
        np.inf if ends[1] is None else float(ends[1]),
    )
    return (least, most) if least <= most else None


def round_biases(graph: ir.Graph) -> None:
    """Make the bias of every Conv and Gemm with quantized input and weight an INT32 in units of its accumulator."""
    for node in [node for node in graph if node.op_type in ("Conv", "Gemm")]:
        weight, source = onnx_helpers.weight_of(node), source_of(node.inputs[0])
        bias = array_of(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        if weight is None or source is None or bias is None or weight.outputs[0] is not node.inputs[1]:
            continue
        layer = onnx_helpers.text(weight, "layer")
        codes, step = array_of(weight.inputs[0]), array_of(weight.inputs[1])
        if number(weight, "dim") > 0:
            continue
        found = grid_bias(bias, codes, array_of(source.inputs[1]), step)
        if found is None:
            continue
        onnx_helpers.set_constant(graph, weight, 1, found.weight_step, f"{layer}.step_of_bias")
        inputs = [
            onnx_helpers.constant(graph, f"{layer}.bias", found.codes),
            onnx_helpers.constant(graph, f"{layer}.bias_step", found.unit),
        ]
        axis = {"axis": 0} if found.unit.ndim else {}
        node.replace_input_with(
            2, onnx_helpers.insert_before(graph, node, "DequantizeLinear", inputs, **axis)
        )


def source_of(value: ir.Value | None) -> ir.Node | None:
    """The quantizer of a tensor, possibly before operators that only move codes, or None."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in MOVES_CODES and node.op_type != "Concat":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node if node is not None and node.op_type == _QUANTIZER else None


def mark_sources(graph: ir.Graph) -> None:
    """Note on every quantizer whether its input has codes already, of the same grid or of another one."""
    for node in placeholders(graph, _QUANTIZER):
        grids = list(_grids_of(node.inputs[0]))
        if grids and all(source is not None and _same_grid(source, node) for source in grids):
            node.attributes[WITHIN] = ir.AttrInt64(WITHIN, 1)
        elif len(grids) == 1 and grids[0] is not None:
            node.attributes[ANOTHER] = ir.AttrInt64(ANOTHER, 1)


def _grids_of(value: ir.Value | None) -> Iterator[ir.Node | None]:
    """The quantizers whose codes a tensor holds; None for values that were not quantized."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type in MOVES_CODES and not node.domain:
        for each in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
            yield from _grids_of(each)
    else:
        yield node if node is not None and node.op_type == _QUANTIZER else None


Step = Callable[[ir.Graph], None]
ARRANGEMENT: tuple[Step, ...] = (
    use_static_shapes,
    absorb_pads,
    use_global_pools,
    use_gemms,
    move_quantizers,
    close_moves,
    gates.use_sums,
    narrow_ranges,
    mark_sources,
    round_biases,
)


def arrange(graph: ir.Graph) -> None:
    """All of the above, in place, after norms were folded and quantizers of the same tensor merged."""
    for position, node in enumerate(placeholders(graph, _QUANTIZER)):
        node.attributes[onnx_helpers.ORDER] = ir.AttrInt64(onnx_helpers.ORDER, position)
    for step in ARRANGEMENT:
        step(graph)


def pad_codes(graph: ir.Graph) -> None:
    """Pad codes instead of dequantized values; to be called once placeholders were replaced."""
    for pad in [node for node in graph if node.op_type == "Pad"]:
        source = pad.inputs[0].producer() if pad.inputs[0] is not None else None
        if source is None or source.op_type != "DequantizeLinear" or _zero_padding(pad) is None:
            continue
        if len(source.inputs) < 3 or array_of(source.inputs[1]) is None or array_of(source.inputs[1]).ndim:
            continue
        codes = ir.node("Pad", [source.inputs[0], pad.inputs[1], source.inputs[2]])
        codes.outputs[0].type = source.inputs[0].type if source.inputs[0] is not None else None
        values = ir.node("DequantizeLinear", [codes.outputs[0], *source.inputs[1:]])
        values.meta.update(source.meta)
        _replace(graph, pad, [codes, values])


def limits(node: ir.Node) -> tuple[int, int]:
    """The least and the largest code that an input placeholder can have."""
    return (
        (number(node, LEAST), number(node, MOST))
        if LEAST in node.attributes
        else (
            number(node, "lowest"),
            number(node, "highest"),
        )
    )
