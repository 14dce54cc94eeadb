"""Groups of Q/DQ nodes: which operators ONNX Runtime computes on codes, and with which kernel.

At default optimization ONNX Runtime replaces DequantizeLinear -> operator -> QuantizeLinear by one operator on codes.
The functions below repeat its decisions on a ``Graph``, in its order, each named after the source that decides:
files of ``onnxruntime/core/optimizer`` as of version 1.32, on x86. Rewritings that change no value are left out.
``verify.twin.check`` compares the resulting operators with those of the runtime's own optimized graph.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from saqcli.verify.twin.graph import DEQUANTIZE, INT8, INT32, QUANTIZE, UINT8, Graph, Node, Scale

_MOVES = ("MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice")  # Q and DQ move through them
_KEEPS_CODES = (
    *("Expand", "Flatten", "Gather", "GatherElements", "Reshape", "Slice", "Squeeze", "Tile", "Transpose"),
    *("Unsqueeze", "MaxPool", "ReduceMax", "ReduceMin", "Resize"),
)
_UNARY = ("AveragePool", "LeakyRelu", "GlobalAveragePool", "Sigmoid", "Softmax")
_BYTES = (UINT8, INT8)
_EPSILON = float(np.finfo(np.float32).eps)


def group(graph: Graph) -> None:
    """Rewrite a graph as ONNX Runtime does."""
    _remove_identities(graph)
    _fold_weight_moves(graph)
    _merge_pairs(graph)
    _give_readers_their_own_dequantizer(graph)
    _move_dequantizers_down(graph)
    _move_quantizers_up(graph)
    _give_readers_their_own_dequantizer(graph)
    _round_biases(graph)
    _drop_clips(graph)
    _make_unsigned(graph)
    for node in list(graph.nodes):
        selector = _SELECTORS.get(node.op)
        if selector is not None:
            selector(graph, node)
            graph.reindex()
    graph.remove_unused()


def _remove_identities(graph: Graph) -> None:
    for node in graph.walk("Identity"):
        if node.output == graph.output:
            continue
        for reader in graph.readers(node.output):
            reader.inputs = [node.inputs[0] if name == node.output else name for name in reader.inputs]
        graph.nodes.remove(node)
        graph.reindex()


def _fold_weight_moves(graph: Graph) -> None:
    """Rearrange dequantized weights where they are stored (``constant_folding.cc``, ``transpose_optimizer``)."""
    for node in [each for each in graph.nodes if each.op in ("Transpose", "Reshape", "Flatten")]:
        source = graph.producers.get(node.inputs[0])
        if source is None or source.op != DEQUANTIZE or source.inputs[0] not in graph.constants:
            continue
        scale = graph.scale(source)
        if scale is None or (not scale.per_tensor and node.op != "Transpose"):
            continue
        codes = graph.constants[source.inputs[0]]
        attributes = dict(source.attributes)
        if node.op == "Transpose":
            order = list(node.attribute("perm", list(range(codes.ndim))[::-1]))
            moved = np.transpose(codes, order)
            if scale.axis is not None:
                attributes["axis"] = order.index(scale.axis % codes.ndim)
        elif node.op == "Reshape" and node.inputs[1] in graph.constants:
            moved = codes.reshape([int(size) for size in graph.constants[node.inputs[1]]])
        else:
            continue
        name = graph.fresh(source.inputs[0])
        graph.constants[name], graph.kinds[name] = np.ascontiguousarray(moved), graph.kinds[source.inputs[0]]
        new = replace(source, inputs=[name, *source.inputs[1:]], output=node.output, attributes=attributes)
        graph.replace([node], new)
        graph.reindex()
    graph.remove_unused()


def _merge_pairs(graph: Graph) -> None:
    """``double_qdq_pairs_remover.cc``: of Q, DQ, Q, DQ in a row the inner two are removed."""
    for first in graph.walk(QUANTIZE):
        chain = _chain(graph, first)
        if chain is None:
            continue
        scales = [graph.scale(node) for node in chain]
        outer, inner = scales[0], scales[2]
        if outer is None or inner is None or scales[1] is None or scales[3] is None:
            continue
        if not (outer.equals(scales[1]) and inner.equals(scales[3])) or outer.kind not in _BYTES:
            continue
        if outer.kind != inner.kind:
            continue
        if not outer.equals(inner):
            merged = _intersection(outer, inner)
            names = [
                graph.set_constant(graph.fresh(first.output), merged.step),
                graph.set_constant(graph.fresh(first.output), merged.zero),
            ]
            graph.kinds[names[1]] = merged.kind
            chain[0].inputs[1:], chain[3].inputs[1:] = names, list(names)
        else:
            graph.renamed[chain[2].output] = chain[0].output
        chain[3].inputs[0] = chain[0].output
        graph.nodes = [node for node in graph.nodes if node not in chain[1:3]]
        graph.reindex()


def _chain(graph: Graph, first: Node) -> list[Node] | None:
    """Q, DQ, Q, DQ from ``first`` on, each the only reader of the one before, or None."""
    chain = [first]
    for op in (DEQUANTIZE, QUANTIZE, DEQUANTIZE):
        reader = graph.only_reader(chain[-1].output)
        if reader is None or reader.op != op:
            return None
        chain.append(reader)
    return chain


def _intersection(one: Scale, other: Scale) -> Scale:
    """The scale of the values that both represent (``DoubleQDQPairsRemover::FindNewZeroPointAndScale``)."""
    lowest, highest = (0, 255) if one.kind == UINT8 else (-128, 127)
    f = np.float32
    ends = [
        (
            f(lowest - each.zero.item()) * f(each.step.item()),
            f(highest - each.zero.item()) * f(each.step.item()),
        )
        for each in (one, other)
    ]
    low, high = max(ends[0][0], ends[1][0]), min(ends[0][1], ends[1][1])
    step = f(f(high - low) / f(highest - lowest))
    zero = _away_from_zero(f(f(lowest) - f(low / step)))
    dtype = np.uint8 if one.kind == UINT8 else np.int8
    return Scale(np.array(step, np.float32), np.array(zero).astype(dtype), one.kind)


def _away_from_zero(value: np.float32) -> int:
    return int(np.sign(value) * np.floor(abs(float(value)) + 0.5))


def _give_readers_their_own_dequantizer(graph: Graph) -> None:
    """``ensure_unique_dq_for_node_unit.cc``."""
    for node in graph.walk(DEQUANTIZE):
        readers = graph.readers(node.output)
        for number, reader in enumerate(readers[1:]):
            if node.output == graph.output:
                break
            copy = replace(node, inputs=list(node.inputs), output=graph.fresh(f"{node.output}:{number}"))
            graph.nodes.insert(graph.nodes.index(node) + 1, copy)
            position = max(index for index, name in enumerate(reader.inputs) if name == node.output)
            reader.inputs[position] = copy.output
        graph.reindex()


def _movable(graph: Graph, node: Node) -> Scale | None:
    scale = graph.scale(node)
    return scale if scale is not None and scale.per_tensor and scale.step.ndim == 0 else None


def _move_dequantizers_down(graph: Graph) -> None:
    """``qdq_propagation.cc``, ``PropagateDQForward``: Q and DQ are inserted after operators that keep codes."""
    for node in graph.walk(DEQUANTIZE):
        if _movable(graph, node) is None or node.inputs[0] in graph.constants:
            continue
        reader = graph.only_reader(node.output)
        while (
            reader is not None and reader.op in _MOVES and reader.inputs[0] and reader.output != graph.output
        ):
            targets = [each for each in graph.readers(reader.output) if each.op != QUANTIZE]
            if not targets:
                break
            _insert_pair(graph, reader.output, targets, node)
            reader = targets[0] if len(targets) == 1 else None


def _move_quantizers_up(graph: Graph) -> None:
    """``qdq_propagation.cc``, ``PropagateQBackward``: Q and DQ are inserted before operators that keep codes."""
    for node in graph.walk(QUANTIZE):
        if _movable(graph, node) is None:
            continue
        current = node
        while True:
            move = graph.producers.get(current.inputs[0])
            if move is None or move.op not in _MOVES or graph.only_reader(move.output) is None:
                break
            source = graph.producers.get(move.inputs[0])
            if source is None or source.op == DEQUANTIZE or graph.only_reader(move.inputs[0]) is None:
                break
            _insert_pair(graph, move.inputs[0], [move], node)
            current = move


def _insert_pair(graph: Graph, tensor: str, readers: list[Node], like: Node) -> None:
    """Quantize a tensor with the parameters of ``like``; each of ``readers`` reads it through a DQ of its own."""
    codes = graph.fresh(tensor)
    at = graph.nodes.index(graph.producers[tensor]) + 1
    graph.nodes.insert(at, Node(QUANTIZE, [tensor, *like.inputs[1:]], codes, dict(like.attributes), codes))
    for reader in dict.fromkeys(readers):
        output = graph.fresh(tensor)
        at += 1
        graph.nodes.insert(
            at, Node(DEQUANTIZE, [codes, *like.inputs[1:]], output, dict(like.attributes), output)
        )
        reader.inputs = [output if name == tensor else name for name in reader.inputs]
    graph.reindex()


def _round_biases(graph: Graph) -> None:
    """``weight_bias_quantization.cc``: a float bias between quantizers is rounded to INT32."""
    for node in [each for each in graph.nodes if each.op in ("Conv", "Gemm")]:
        bias = graph.constants.get(node.input(2))
        x, weight = (graph.producers.get(name) for name in node.inputs[:2])
        if bias is None or bias.dtype != np.float32 or bias.ndim != 1 or x is None or weight is None:
            continue
        if x.op != DEQUANTIZE or weight.op != DEQUANTIZE or not _leads_to_quantizer(graph, node):
            continue
        fed, scale = graph.scale(x), graph.scale(weight)
        if fed is None or scale is None or not fed.per_tensor:
            continue
        step = np.asarray(fed.step * scale.step, np.float32).reshape(-1)
        codes = np.rint((bias / step).astype(np.float32)).astype(np.int32)
        name = graph.set_constant(graph.fresh(node.input(2)), codes)
        steps = graph.set_constant(graph.fresh(name), step if step.size > 1 else step.reshape(()))
        output = graph.fresh(name)
        axis = {"axis": 0} if step.size > 1 else {}
        graph.nodes.insert(graph.nodes.index(node), Node(DEQUANTIZE, [name, steps], output, axis, output))
        node.inputs[2] = output
        graph.reindex()


def _leads_to_quantizer(graph: Graph, node: Node) -> bool:
    reader = graph.only_reader(node.output)
    while reader is not None and reader.op in ("Relu", "Clip"):
        reader = graph.only_reader(reader.output)
    return reader is not None and reader.op == QUANTIZE


def _drop_clips(graph: Graph) -> None:
    """``relu_quantizelinear.cc``, ``clip_quantizelinear.cc``: a ReLU or Clip that the quantizer repeats is removed."""
    for node in [each for each in graph.nodes if each.op in ("Relu", "Clip")]:
        quantizer = graph.only_reader(node.output)
        if quantizer is None or quantizer.op != QUANTIZE:
            continue
        scale = graph.scale(quantizer)
        if scale is None or scale.step.ndim or not _repeated(graph, node, scale):
            continue
        quantizer.inputs[0] = node.inputs[0]
        graph.nodes.remove(node)
        graph.reindex()


def _repeated(graph: Graph, node: Node, scale: Scale) -> bool:
    ends = _ends(scale)
    zero = scale.zero.item()
    if node.op == "Relu":
        return ends is None or bool(zero == ends[0])
    limits = _limits(graph, node)
    if limits is None or ends is None:
        return False
    step = np.float32(scale.step.item())
    lower, upper = step * np.float32(ends[0] - zero), step * np.float32(ends[1] - zero)
    return not (np.float32(limits[0] - lower) > _EPSILON or np.float32(upper - limits[1]) > _EPSILON)


def _ends(scale: Scale) -> tuple[int, int] | None:
    return {UINT8: (0, 255), INT8: (-128, 127)}.get(scale.kind)


def _limits(graph: Graph, node: Node) -> tuple[np.float32, np.float32] | None:
    """The constant limits of a Clip, or None if they are not constant."""
    limits = [np.finfo(np.float32).min, np.finfo(np.float32).max]
    for index in (1, 2):
        name = node.input(index)
        if name and (name not in graph.constants or graph.constants[name].dtype != np.float32):
            return None
        if name:
            limits[index - 1] = np.float32(graph.constants[name].item())
    return limits[0], limits[1]


def _make_unsigned(graph: Graph) -> None:
    """``qdq_s8_to_u8.cc``: INT8 codes with one reader become UINT8 with a zero point larger by 128."""
    for node in graph.walk(QUANTIZE):
        reader = graph.only_reader(node.output)
        if reader is None or reader.op != DEQUANTIZE:
            continue
        scale, other = graph.scale(node), graph.scale(reader)
        if scale is None or other is None or not node.input(2) or not reader.input(2):
            continue
        if not (scale.zero.size == other.zero.size == 1 and scale.kind == other.kind == INT8):
            continue
        if scale.zero.item() != other.zero.item():
            continue
        zero = (scale.zero.astype(np.int16) + 128).astype(np.uint8)
        name = graph.set_constant(graph.fresh(node.inputs[2]), zero)
        output = graph.fresh(node.output)
        graph.renamed[node.output] = output
        graph.shifted.add(output)
        node.output = reader.inputs[0] = output
        node.inputs[2] = reader.inputs[2] = name
        graph.reindex()


class _Selection:
    """The DQ nodes before an operator and the Q node after it (``NodeGroupSelector::GetQDQSelection``)."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph, self.node = graph, node
        given = [graph.producers.get(name) for name in node.inputs if name]
        self.inputs = [each for each in given if each is not None and each.op == DEQUANTIZE]
        self.complete = len(self.inputs) == len(given)
        self.clip: Node | None = None
        self.valid = all(graph.scale(each) is not None for each in self.inputs)
        last = node
        follower = graph.only_reader(node.output)
        limits = follower is not None and follower.op in ("Relu", "Clip")
        if follower is not None and limits and graph.only_reader(follower.output) is not None:
            self.clip = last = follower
        readers = graph.readers(last.output)
        found = [each for each in readers if each.op == QUANTIZE]
        self.any_quantizer = bool(found)
        alone = len(readers) == 1 and last.output != graph.output and not node.more_outputs
        self.quantizer = found[0] if found and alone and graph.scale(found[0]) is not None else None
        if self.clip is not None and (self.quantizer is None or not self._redundant()):
            self.valid = False

    def _redundant(self) -> bool:
        """``IsClipMadeRedundantByQ`` of ``qdq_util.cc``."""
        assert self.clip is not None
        assert self.quantizer is not None
        scale = self.graph.scale(self.quantizer)
        ends = _ends(scale) if scale is not None else None
        if scale is None or ends is None or scale.step.ndim:
            return False
        zero = scale.zero.item()
        if self.clip.op == "Relu":
            return bool(zero == ends[0])
        limits = _limits(self.graph, self.clip)
        if limits is None:
            return False
        step = np.float32(scale.step.item())
        low, high = (float(np.rint(np.float32(limit / step))) + zero for limit in limits)
        return bool(low <= ends[0] and high >= ends[1])

    def kind(self, index: int) -> int:
        """The type of the codes of an input."""
        scale = self.graph.scale(self.inputs[index])
        assert scale is not None
        return scale.kind

    @property
    def result(self) -> int | None:
        """The type of the codes of the result; None if it is not quantized."""
        scale = self.graph.scale(self.quantizer) if self.quantizer is not None else None
        return scale.kind if scale is not None else None

    def become(self, op: str, inputs: list[str], attributes: dict[str, object] | None = None) -> None:
        """Replace the operator, and the Q after it, by ``op``."""
        last = self.quantizer or self.node
        new = Node(
            op,
            inputs,
            last.output,
            dict(self.node.attributes) if attributes is None else attributes,
            self.node.name,
            self.node.layer,
            self.node.proto,
        )
        old = [each for each in (self.node, self.clip, self.quantizer) if each is not None]
        self.graph.replace(old, new)


def _params(node: Node) -> list[str]:
    """Step and zero point of a Q or DQ."""
    return [node.inputs[1], node.input(2)]


def _conv(graph: Graph, node: Node) -> None:
    """``ConvNodeGroupSelector``: INT8 inputs are not allowed on x86."""
    found = _Selection(graph, node)
    if not (found.valid and found.complete and found.quantizer is not None and len(found.inputs) >= 2):
        return
    if found.kind(0) != UINT8 or found.result != UINT8 or found.kind(1) not in _BYTES:
        return
    if len(found.inputs) == 3 and found.kind(2) != INT32:
        return
    x, weight, *bias = found.inputs
    inputs = [*_three(x), *_three(weight), *_params(found.quantizer)]
    found.become("QLinearConv", inputs + [each.inputs[0] for each in bias])


def _three(node: Node) -> list[str]:
    return [node.inputs[0], *_params(node)]


def _matmul(graph: Graph, node: Node) -> None:
    """``MatMulNodeGroupSelector``."""
    found = _Selection(graph, node)
    if not (found.valid and len(found.inputs) == 2):
        return
    if found.kind(0) != UINT8 or found.kind(1) not in _BYTES:
        return
    a, b = found.inputs
    if not found.any_quantizer:
        found.become(
            "MatMulIntegerToFloat",
            [a.inputs[0], b.inputs[0], a.inputs[1], b.inputs[1], a.input(2), b.input(2)],
        )
    elif found.quantizer is not None and found.result == UINT8:
        found.become("QLinearMatMul", [*_three(a), *_three(b), *_params(found.quantizer)])


def _gemm(graph: Graph, node: Node) -> None:
    """``GemmNodeGroupSelector``: with or without a quantizer after it; the operands have zero points (measured)."""
    found = _Selection(graph, node)
    if not (found.valid and found.complete and len(found.inputs) >= 2):
        return
    if found.any_quantizer and found.quantizer is None:
        return
    if not all(each.input(2) for each in found.inputs[:2]):
        return
    kinds = [found.kind(index) for index in range(len(found.inputs))]
    if kinds[0] not in _BYTES or kinds[1] not in _BYTES or (kinds[0] == INT8 != kinds[1]):
        return
    if found.result not in (None, kinds[0]):
        return
    if len(kinds) == 3 and (kinds[2] != INT32 or node.attribute("beta", 1.0) != 1.0):
        return
    a, b, *bias = found.inputs
    inputs = [*_three(a), *_three(b), bias[0].inputs[0] if bias else ""]
    found.become("QGemm", inputs + (_params(found.quantizer) if found.quantizer is not None else []))


def _unary(graph: Graph, node: Node) -> None:
    """``UnaryNodeGroupSelector``."""
    found = _Selection(graph, node)
    if not (found.valid and found.complete and len(found.inputs) == 1 and found.quantizer is not None):
        return
    if found.kind(0) in _BYTES and found.kind(0) == found.result:
        found.become(f"QLinear{node.op}", [*_three(found.inputs[0]), *_params(found.quantizer)])


def _binary(graph: Graph, node: Node) -> None:
    """``BinaryNodeGroupSelector``."""
    found = _Selection(graph, node)
    if not (found.valid and found.complete and len(found.inputs) == 2 and found.quantizer is not None):
        return
    if found.kind(0) in _BYTES and found.kind(0) == found.kind(1) == found.result:
        a, b = found.inputs
        found.become(f"QLinear{node.op}", [*_three(a), *_three(b), *_params(found.quantizer)])


def _concat(graph: Graph, node: Node) -> None:
    """``VariadicNodeGroupSelector``."""
    found = _Selection(graph, node)
    if not (found.valid and found.complete and found.inputs and found.quantizer is not None):
        return
    kinds = {found.kind(index) for index in range(len(found.inputs))}
    if kinds == {found.result} and found.result in _BYTES:
        inputs = _params(found.quantizer)
        found.become("QLinearConcat", inputs + [name for each in found.inputs for name in _three(each)])


def _keeps_codes(graph: Graph, node: Node) -> None:
    """``DropQDQNodeGroupSelector``: an operator that moves values moves their codes."""
    found = _Selection(graph, node)
    if not (found.valid and found.clip is None and len(found.inputs) == 1 and found.quantizer is not None):
        return
    if graph.producers.get(node.inputs[0]) is not found.inputs[0]:
        return
    before, after = graph.scale(found.inputs[0]), graph.scale(found.quantizer)
    assert before is not None
    assert after is not None
    if before.equals(after) and found.inputs[0].input(2) and found.quantizer.input(2):
        found.become(node.op, [found.inputs[0].inputs[0], *node.inputs[1:]])


_SELECTORS: dict[str, Callable[[Graph, Node], None]] = {
    "Conv": _conv,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Add": _binary,
    "Mul": _binary,
    "Concat": _concat,
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_KEEPS_CODES, _keeps_codes),
}
