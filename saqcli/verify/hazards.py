"""Hazards: graph patterns that optimizations of ONNX Runtime change.

    H1   a float bias inside Conv or Gemm between quantized tensors is rounded to a multiple of the scales
    H1b  a float constant weight between quantized tensors is quantized again, per tensor
    H2   a dequantized weight times a float activation: the activation is quantized on the fly
    H3   Clip before a 4- or 2-bit quantizer: the session cannot be created
    H4   ReLU before a signed or shifted 4- or 2-bit quantizer is removed
    H5   2-bit weights with quantized activations give an invalid graph
    H8   the alpha of a Gemm between quantized tensors, if not 1, is lost
    H10  a tensor that is quantized, dequantized, and quantized again on another grid: one of the pairs is removed
    H9   8-bit inputs times INT8 weights (or activations) whose sums of two products exceed 16 bits: wrong on x86
         processors without VNNI

The exporters avoid all of them; this file checks the result (``docs/export.md`` describes how each was found).
Reproduced with ONNX Runtime 1.32. H6 and H7 are not graph patterns (see there).

H9 depends on the processor. A style may declare it as a condition of use, which the verdict then names.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from saqcli.export.onnx_helpers import LAYER, may_saturate
from saqcli.units import counted

_FOUR, _TWO = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4), (onnx.TensorProto.INT2, onnx.TensorProto.UINT2)
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BIASED = ("Conv", "ConvTranspose", "Gemm")


SATURATION = (
    "wrong on x86 processors without VNNI, where ONNX Runtime and OpenVINO saturate sums of two 8-bit products at 16 "
    "bits; correct with VNNI, and in ONNX Runtime with session.x64quantprecision=1. No sum saturates with UINT8 "
    "weights (style qdq), nor with weights of 7 bits on a grid with zero (`quantization.weight_grid=zero`) or of 6 bits"
)
NAMED = 3  # most layers that a message names


@dataclass(frozen=True)
class Hazard:
    """A pattern that an optimization would change.

    Attributes:
        code: H1 to H10.
        node: layer, if the file names it, otherwise name of the node.
        text: the effect.
    """

    code: str
    node: str
    text: str

    def __str__(self) -> str:
        return f"{self.code} at {self.node}: {self.text}"


def hazards(model: onnx.ModelProto) -> list[Hazard]:
    """All hazards of a graph, in order."""
    graph = _Graph(model)
    return [
        Hazard(code, graph.place(node), text)
        for node in model.graph.node
        for code, text in _node_hazards(graph, node)
    ]


def summaries(found: Sequence[Hazard]) -> list[str]:
    """One line for each kind of hazard, with the first places where it is: ``H9 at conv1 and fc: wrong on ...``."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for hazard in found:
        places[hazard.code, hazard.text].append(hazard.node)
    return [f"{code} at {_listed(nodes)}: {text}" for (code, text), nodes in places.items()]


def _listed(names: Sequence[str]) -> str:
    if len(names) <= NAMED:
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    return f"{', '.join(names[:NAMED])} and {counted(len(names) - NAMED, 'more layer')}"


def partition(found: Sequence[Hazard], accepted: Collection[str]) -> tuple[list[Hazard], list[Hazard]]:
    """Split hazards into those that make a file invalid and those that are conditions of its use.

    Args:
        found: from ``hazards``.
        accepted: codes accepted by the style, ``OnnxStyle.conditions``.
    """
    return (
        [hazard for hazard in found if hazard.code not in accepted],
        [hazard for hazard in found if hazard.code in accepted],
    )


class _Graph:
    """Producers and readers of tensors, constants, and ranks."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.constants = {each.name: each for each in model.graph.initializer}
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        try:
            inferred = onnx.shape_inference.infer_shapes(model).graph
        except Exception:  # shapes are needed for one pattern only
            inferred = model.graph
        known = [*inferred.value_info, *inferred.input, *inferred.output]
        self.ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in known}

    def place(self, node: Any) -> str:
        """The layer of a node, from its annotations or those of its weight; the name of the node if there are none."""
        weight = self.dequantizer(node.input[1])[0] if len(node.input) > 1 else None
        constant = weight is not None and weight.input[0] in self.constants
        layer = _layer(node) or (_layer(weight) if constant else "")
        return layer or str(node.name or node.output[0])

    def dequantizer(self, name: str) -> tuple[Any, bool]:
        """The DequantizeLinear that produces a tensor, and whether an odd number of transposes lies in between."""
        node, odd = self.producers.get(name), False
        while node is not None and node.op_type == "Transpose":
            node, odd = self.producers.get(node.input[0]), not odd
        return (node if node is not None and node.op_type == "DequantizeLinear" else None), odd

    def dequantized(self, name: str) -> bool:
        """Whether DequantizeLinear produces a tensor, possibly through transposes."""
        return self.dequantizer(name)[0] is not None

    def unpacked(self, name: str) -> bool:
        """Whether a tensor consists of constants of 4 bits, unpacked by operators that a runtime evaluates once."""
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Cast", "Add", "Mul"):
            if node.input[0] in self.constants:
                return self.constants[node.input[0]].data_type in _FOUR
            node = self.producers.get(node.input[0])
        return False

    def quantized_next(self, name: str) -> bool:
        """Whether a tensor is quantized next, possibly after ReLUs and Clips."""
        for node in self.readers[name]:
            if node.op_type == "QuantizeLinear":
                return True
            if node.op_type in ("Relu", "Clip") and self.quantized_next(node.output[0]):
                return True
        return False

    def stored(self, name: str) -> int | None:
        """The type of the constant input of a DequantizeLinear, or None."""
        node = self.producers.get(name)
        while node is not None and node.op_type in ("Transpose", "DequantizeLinear"):
            if node.input[0] in self.constants:
                return int(self.constants[node.input[0]].data_type)
            node = self.producers.get(node.input[0])
        return None


def _layer(node: Any) -> str:
    return next((str(entry.value) for entry in node.metadata_props if entry.key == LAYER), "")


def _node_hazards(graph: _Graph, node: Any) -> Iterator[tuple[str, str]]:
    if node.op_type in _PRODUCTS:
        yield from _product_hazards(graph, node)
    if node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2] in graph.constants:
        yield from _quantizer_hazards(graph, node)


def _product_hazards(graph: _Graph, node: Any) -> Iterator[tuple[str, str]]:
    x, weight = node.input[0], node.input[1]
    fed, dequantized = graph.dequantized(x), graph.dequantized(weight)
    output = node.output[0]
    if (
        fed
        and node.op_type in _BIASED
        and len(node.input) > 2
        and node.input[2] in graph.constants
        and graph.quantized_next(output)
    ):
        yield "H1", "its bias would be rounded to a multiple of its scales"
    if fed and node.op_type == "MatMul" and graph.ranks.get(x) == 2:
        sums = [each for each in graph.readers[output] if each.op_type == "Add"]
        constant = [each for each in sums if any(name in graph.constants for name in each.input)]
        if any(graph.quantized_next(each.output[0]) for each in constant):
            yield "H1", "with the Add after it, it would become a Gemm, whose bias would be rounded"
    if fed and weight in graph.constants and graph.quantized_next(output):
        yield "H1b", "its float weight would be quantized again, per tensor"
    if dequantized and not fed and node.op_type in ("MatMul", "Gemm") and graph.stored(weight) is not None:
        yield "H2", "its float input would be quantized on the fly"
    if fed and graph.stored(weight) in _TWO:
        yield "H5", "2-bit weights with quantized inputs give an invalid graph"
    if fed and node.op_type != "ConvTranspose" and _saturates(graph, node, weight):
        yield "H9", SATURATION
    alpha = [each.f for each in node.attribute if each.name == "alpha"]
    if node.op_type == "Gemm" and alpha and alpha[0] != 1.0 and fed:
        yield "H8", "its alpha would be lost"


def _saturates(graph: _Graph, node: Any, weight: str) -> bool:
    """Whether two products of 8-bit codes may exceed 16 bits, with an INT8 second operand."""
    dequantizer, transposed = graph.dequantizer(weight)
    if dequantizer is None:
        return False
    if graph.unpacked(dequantizer.input[0]):
        return False
    if dequantizer.input[0] not in graph.constants:  # an activation, which may have any code
        zero = graph.constants.get(dequantizer.input[2]) if len(dequantizer.input) > 2 else None
        return zero is not None and zero.data_type == onnx.TensorProto.INT8
    stored = graph.constants[dequantizer.input[0]]
    if stored.data_type != onnx.TensorProto.INT8:
        return False
    codes = onnx.numpy_helper.to_array(stored)
    if node.op_type == "Conv":
        return may_saturate(codes, 0)
    by_rows = any(each.name == "transB" and each.i for each in node.attribute)
    return may_saturate(codes, codes.ndim - 1 if by_rows == transposed else codes.ndim - 2)


def _requantizes(graph: _Graph, node: Any) -> bool:
    """Whether a quantizer follows a pair of another grid, and is dequantized next: for DoubleQDQPairsRemover."""
    before, after = graph.producers.get(node.input[0]), graph.readers[node.output[0]]
    if before is None or before.op_type != "DequantizeLinear" or len(graph.readers[node.input[0]]) != 1:
        return False
    first = graph.producers.get(before.input[0])
    if first is None or first.op_type != "QuantizeLinear" or not after:
        return False
    if any(each.op_type != "DequantizeLinear" for each in after) or len(graph.readers[before.input[0]]) != 1:
        return False
    grids = [[graph.constants.get(name) for name in each.input[1:3]] for each in (first, node)]
    if any(value is None for grid in grids for value in grid):
        return False
    one, other = ([onnx.numpy_helper.to_array(value) for value in grid] for grid in grids)
    return any((a.dtype, a.tolist()) != (b.dtype, b.tolist()) for a, b in zip(one, other, strict=True))


def _quantizer_hazards(graph: _Graph, node: Any) -> Iterator[tuple[str, str]]:
    zero = graph.constants[node.input[2]]
    if _requantizes(graph, node):
        yield "H10", "it and the quantizer before it would become one, with the codes of neither"
    if zero.data_type not in (*_FOUR, *_TWO):
        return
    maker = graph.producers.get(node.input[0])
    signed = zero.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.INT2)
    if maker is not None and maker.op_type == "Clip" and maker.input[0] in graph.producers:
        yield "H3", "a Clip before a quantizer below 8 bits makes the session fail"
    if (
        maker is not None
        and maker.op_type == "Relu"
        and (signed or onnx.numpy_helper.to_array(zero).astype(int).any())
    ):
        yield "H4", "the ReLU before it would be removed"
