"""Operators of a file as ONNX Runtime runs them: which compute on integers, and where codes become values in between.

They are those of the graph that ONNX Runtime saves after its optimizations. Their names are still those of the
operators that they were fused from, by which they are assigned to the layers of the file.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from saqcli.export import onnx_helpers
from saqcli.units import counted

_FLOAT_RESULT = ("DequantizeLinear", "MatMulIntegerToFloat", "ConvIntegerToFloat", "DynamicQuantizeMatMul")
_QGEMM_INPUTS = 9  # of a QGemm that returns codes; with fewer it returns values
# Shapes are computed by them, and values moved; what matters is the arithmetic.
_NO_ARITHMETIC = {
    *(
        "Shape",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Concat",
        "Slice",
        "Split",
        "Gather",
    ),
    *("Cast", "Expand", "Identity", "Constant", "ConstantOfShape", "Pad", "ReorderInput", "ReorderOutput"),
}
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class Operator:
    """An operator of the optimized graph.

    Attributes:
        layer: name of the layer whose weight it multiplies with; empty for other operators.
        before: name of the layer or junction that reads its result next; empty if none is known.
        kind: name of the operator, ``Conv`` or ``QLinearConv``.
        integer: whether its operands are codes.
        round_trip: whether it lies between codes before it and codes after it, and works on values.
    """

    layer: str
    before: str
    kind: str
    integer: bool
    round_trip: bool = False

    @property
    def place(self) -> str:
        """Where it is, for a person."""
        return self.layer or (f"before {self.before}" if self.before else "at the end")


def list_operators(original: Any, optimized: Any) -> tuple[Operator, ...]:
    """All operators that do arithmetic, in order.

    Args:
        original: ``onnx.GraphProto`` of the file; layers are known where saq wrote it.
        optimized: the graph that ONNX Runtime runs.
    """
    layers, readers = _layers(original), _next_layers(original)
    constants = {each.name for each in optimized.initializer}
    codes, after_codes = _flows(optimized, constants)
    to_codes = _reaching_quantizers(optimized)
    ahead = _known_ahead(optimized, layers, readers)
    found = []
    for node in optimized.node:
        inputs = [name for name in node.input if name and name not in constants]
        kind = node.op_type
        if not inputs or kind in _NO_ARITHMETIC:
            continue
        integer = any(name in codes for name in inputs) and kind not in (QUANTIZE, DEQUANTIZE)
        name = _original_name(node)
        between = not integer and any(name in after_codes for name in inputs) and node.output[0] in to_codes
        if kind in (QUANTIZE, DEQUANTIZE) and not between:
            continue  # at the ends of the network
        found.append(Operator(layers.get(name, ""), ahead.get(node.output[0], ""), kind, integer, between))
    return tuple(found)


def _flows(graph: Any, constants: set[str]) -> tuple[set[str], set[str]]:
    """The tensors of codes, and the tensors of values that were computed from codes."""
    codes: set[str] = set()
    values: set[str] = set()
    for node in graph.node:
        inputs = [name for name in node.input if name and name not in constants]
        on_codes = any(name in codes for name in inputs)
        back = node.op_type in _FLOAT_RESULT or (node.op_type == "QGemm" and len(node.input) < _QGEMM_INPUTS)
        if node.op_type == QUANTIZE or (on_codes and not back):
            codes.update(node.output)
        elif on_codes or any(name in values for name in inputs):
            values.update(node.output)
    return codes, codes | values


def _reaching_quantizers(graph: Any) -> set[str]:
    """The tensors from which values come to a quantizer without passing another one."""
    reaching: set[str] = set()
    for node in reversed(graph.node):
        if node.op_type == QUANTIZE:
            reaching.update((node.input[0], node.output[0]))
        elif any(name in reaching for name in node.output) and node.op_type != DEQUANTIZE:
            reaching.update(name for name in node.input if name)
        if node.op_type == DEQUANTIZE and node.output[0] in reaching:
            reaching.add(node.input[0])
    return reaching


def _annotations(node: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _layers(graph: Any) -> dict[str, str]:
    """The layer of every node that multiplies with its weight, by the node's name."""
    weights: dict[str, str] = {}
    for node in graph.node:
        known = _annotations(node)
        if known.get(onnx_helpers.OPERAND) == "weight":
            weights.update(dict.fromkeys(node.output, known[onnx_helpers.LAYER]))
        elif node.op_type in ("Transpose", "Slice") and node.input[0] in weights:
            weights.update(dict.fromkeys(node.output, weights[node.input[0]]))
    return {
        node.name: weights[name]
        for node in graph.node
        if node.op_type in onnx_helpers.MULTIPLIERS
        for name in node.input[1:2]
        if name in weights
    }


def _next_layers(graph: Any) -> dict[str, str]:
    """The first layer or junction that quantizes the result of every node, by the node's name."""
    ahead: dict[str, str] = {}
    found: dict[str, str] = {}
    for node in reversed(graph.node):
        known = _annotations(node)
        own = known.get(onnx_helpers.LAYER, "") if known.get(onnx_helpers.OPERAND) == "input" else ""
        following = own or next((ahead[name] for name in node.output if name in ahead), "")
        found[node.name] = following
        for name in node.input:
            if following:
                ahead[name] = following
    return found


def _original_name(node: Any) -> str:
    """The name of the operator that an optimized one was made from."""
    return re.sub(r"_token_\d+$", "", node.name)


def _known_ahead(graph: Any, layers: Mapping[str, str], readers: Mapping[str, str]) -> dict[str, str]:
    """The layer or junction that reads every tensor of the optimized graph next, directly or later.

    Args:
        graph: the optimized graph.
        layers: by the names of operators of the file.
        readers: what reads their results next, as well; the optimizer adds operators with other names.
    """
    ahead: dict[str, str] = {}
    for node in reversed(graph.node):
        name = _original_name(node)
        following = readers.get(name) or next((ahead[each] for each in node.output if each in ahead), "")
        ahead.update({each: following for each in node.output if following})
        own = layers.get(name) or following
        ahead.update({each: own for each in node.input if own})
    return ahead


NAMED = 4  # most places that a line names


def summary(operators: tuple[Operator, ...]) -> Iterator[str]:
    """Lines for a person: operators by kind, on integers, between codes, and others in floating point."""
    integer = Counter(each.kind for each in operators if each.integer)
    if integer:
        yield f"on integers: {', '.join(f'{count} {kind}' for kind, count in integer.items())}"
    trips = sum(each.round_trip and each.kind == QUANTIZE for each in operators)
    if trips:
        yield f"codes become values and codes again {counted(trips, 'time')}"
    places: dict[str, list[str]] = {}
    for each in operators:
        if not each.integer and each.kind not in (QUANTIZE, DEQUANTIZE):
            places.setdefault(each.kind, []).append(each.place)
    for kind, found in places.items():
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        yield f"in floating point: {len(found)} {kind} ({', '.join(found[:NAMED])}{more})"
