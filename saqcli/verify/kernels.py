"""Operators of a file as ONNX Runtime runs them: which compute on integers, and where codes become values in between.

They are those of the graph that ONNX Runtime saves after its optimizations. Their names are still those of the
operators that they were fused from, by which they are assigned to the layers of the file.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from saqcli.export import onnx_helpers

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
    ahead = _known_ahead(optimized, readers)
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


def _known_ahead(graph: Any, readers: Mapping[str, str]) -> dict[str, str]:
    """The layer or junction that reads every tensor of the optimized graph next, directly or later.

    Args:
        graph: the optimized graph.
        readers: the same for operators of the file, by name; the optimizer adds others.
    """
    ahead: dict[str, str] = {}
    for node in reversed(graph.node):
        known = readers.get(_original_name(node)) or next(
            (ahead[name] for name in node.output if name in ahead), ""
        )
        for name in node.output:
            ahead.setdefault(name, known)
        for name in node.input:
            if known:
                ahead[name] = known
    return ahead


def summary(operators: tuple[Operator, ...]) -> Iterator[str]:
    """Lines for a person: how many operators of each kind run on integers, then each that does not."""
    kinds: dict[str, int] = {}
    for each in operators:
        if each.integer:
            kinds[each.kind] = kinds.get(each.kind, 0) + 1
    if kinds:
        yield f"on integers: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
    for trips, text in ((True, "between codes, in floating point"), (False, "in floating point")):
        rest = [
            f"{each.kind} {each.place}" for each in operators if not each.integer and each.round_trip is trips
        ]
        if rest:
            yield f"{text}: {', '.join(rest)}"
