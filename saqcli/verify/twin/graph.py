"""A mutable graph of an ONNX file, in which Q/DQ groups become the operators that ONNX Runtime runs.

Operators without inputs that depend on the image are constants: they are folded when the file is read, except
DequantizeLinear, which groups need.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from saqcli.errors import CorruptArtifact
from saqcli.export.onnx_helpers import LAYER
from saqcli.serialization import printable
from saqcli.verify.twin.reference import reference

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
UINT8, INT8, INT32 = onnx.TensorProto.UINT8, onnx.TensorProto.INT8, onnx.TensorProto.INT32


@dataclass(eq=False)
class Node:
    """One operator.

    Attributes:
        op: operator type, of ONNX or of ONNX Runtime.
        inputs: names of tensors; "" if an optional input is absent.
        output: name of its (first) output.
        attributes: by name; strings are ``str``.
        name: name in the file, or of the output.
        layer: layers that the file names in annotations, "" if none.
        proto: the node of the file, for operators that keep their form.
    """

    op: str
    inputs: list[str]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    layer: str = ""
    proto: Any = None
    more_outputs: tuple[str, ...] = ()

    def attribute(self, name: str, default: Any) -> Any:
        """The value of an attribute, or ``default``."""
        return self.attributes.get(name, default)

    def input(self, index: int) -> str:
        """The name of an input, "" if it is absent."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass
class Scale:
    """Step, zero point, container type and axis of a QuantizeLinear or DequantizeLinear with constant parameters.

    Attributes:
        step: float32, a scalar array or one value a channel.
        zero: integer, with the shape of ``step``.
        kind: type of the codes, as in ``onnx.TensorProto``.
        axis: axis of the channels; None per tensor.
    """

    step: Any
    zero: Any
    kind: int
    axis: int | None = None

    @property
    def per_tensor(self) -> bool:
        """Whether there is one step for all channels."""
        return bool(self.step.size == 1)

    def equals(self, other: "Scale") -> bool:
        """Whether codes mean the same; per tensor only."""
        return bool(
            self.per_tensor
            and other.per_tensor
            and self.kind == other.kind
            and self.step.item() == other.step.item()
            and self.zero.item() == other.zero.item()
        )


class Graph:
    """Nodes in topological order, and constants.

    Attributes:
        constants: arrays by name.
        kinds: types of constants, as in ``onnx.TensorProto``.
        input: name of the images.
        output: name of the logits.
        opset: version of the standard operators.
        renamed: new names of tensors of the file whose codes are stored otherwise.
        shifted: new names of INT8 codes that are stored as UINT8, larger by 128.
    """

    def __init__(self, path: Path) -> None:
        """Read ``path`` and fold its constants.

        Raises:
            CorruptArtifact: it is not a graph from one batch of images to logits.
        """
        try:
            model = onnx.load(str(path))
        except Exception as error:
            reason = printable(" ".join(str(error).split()), 200)
            raise CorruptArtifact(f"{path} is not an ONNX file: {reason}") from None
        graph = model.graph
        self.constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.kinds = {each.name: int(each.data_type) for each in graph.initializer}
        inputs = [each.name for each in graph.input if each.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise CorruptArtifact(
                f"{path} has {len(inputs)} inputs and {len(graph.output)} outputs instead of one of each"
            )
        (self.input,) = inputs
        self.output = graph.output[0].name
        opsets = {each.domain: each.version for each in model.opset_import}
        self.opset = int(opsets.get("", opsets.get("ai.onnx", 1)))
        self.renamed: dict[str, str] = {}
        self.shifted: set[str] = set()
        self.nodes: list[Node] = []
        self._fresh = 0
        for proto in graph.node:
            self._read(proto)
        self.producers: dict[str, Node] = {}
        self.consumers: dict[str, list[Node]] = {}
        self.reindex()

    def _read(self, proto: Any) -> None:
        attributes = {each.name: _value(each) for each in proto.attribute}
        layer = next((each.value for each in proto.metadata_props if each.key == LAYER), "")
        node = Node(
            proto.op_type,
            list(proto.input),
            proto.output[0],
            attributes,
            proto.name or proto.output[0],
            layer,
            proto,
            tuple(proto.output[1:]),
        )
        if node.op == "Constant":
            array = attributes.get("value")
            if array is None:
                array = np.array(next(iter(attributes.values())))
                array = array.astype(np.float32) if array.dtype == np.float64 else array
            self.set_constant(node.output, array)
        elif not self._fold(node):
            self.nodes.append(node)

    def _fold(self, node: Node) -> bool:
        """Make the outputs of a node constants, if its inputs are and ONNX's reference implementation knows it."""
        proto = node.proto
        if node.op == DEQUANTIZE or proto.domain not in ("", "ai.onnx") or not node.inputs:
            return False
        if not all(not name or name in self.constants for name in node.inputs):
            return False
        try:
            results = reference(proto, [self.constants.get(name) for name in node.inputs], self.opset)
        except Exception:  # anything may be in a file; the node stays, and fails where it is needed
            return False
        for name, value in zip(proto.output, results, strict=True):
            self.set_constant(name, value)
        return True

    def set_constant(self, name: str, array: Any) -> str:
        """Add a constant; return its name."""
        self.constants[name] = np.asarray(array)
        self.kinds[name] = int(onnx.helper.np_dtype_to_tensor_dtype(self.constants[name].dtype))
        return name

    def fresh(self, base: str) -> str:
        """A name that is not in use."""
        self._fresh += 1
        return f"{base}::{self._fresh}"

    def reindex(self) -> None:
        """Find producers and consumers after a change."""
        self.producers = {name: node for node in self.nodes for name in (node.output, *node.more_outputs)}
        self.consumers = defaultdict(list)
        for node in self.nodes:
            for name in node.inputs:
                if name:
                    self.consumers[name].append(node)

    def readers(self, name: str) -> list[Node]:
        """The nodes that read a tensor, once for every input."""
        return self.consumers.get(name, [])

    def only_reader(self, name: str) -> Node | None:
        """The node that reads a tensor, if it is the only one and the tensor is not an output."""
        readers = self.readers(name)
        return readers[0] if len(readers) == 1 and name != self.output else None

    def scale(self, node: Node) -> Scale | None:
        """The parameters of a QuantizeLinear or DequantizeLinear; None if they are not constant, or by blocks."""
        step = self.constants.get(node.input(1))
        if step is None or step.dtype != np.float32 or node.attribute("block_size", 0):
            return None
        zero_name = node.input(2)
        if zero_name:
            if zero_name not in self.constants:
                return None
            zero, kind = self.constants[zero_name], self.kinds[zero_name]
        else:
            stored = self.kinds.get(node.input(0))
            kind = stored if stored is not None and node.op == DEQUANTIZE else UINT8
            kind = int(node.attribute("output_dtype", 0)) or kind
            zero = np.zeros(step.shape, np.int32)
        axis = None if step.size == 1 else int(node.attribute("axis", 1))
        return Scale(step, np.asarray(zero).astype(np.int32), kind, axis)

    def replace(self, old: Iterable[Node], new: Node) -> None:
        """Put ``new`` in the place of the last of ``old``, which are removed."""
        gone = set(old)
        position = max(index for index, node in enumerate(self.nodes) if node in gone)
        self.nodes[position] = new
        self.nodes = [node for node in self.nodes if node not in gone]

    def remove_unused(self) -> None:
        """Remove nodes whose outputs nobody reads."""
        needed, kept = {self.output}, []
        for node in reversed(self.nodes):
            if needed & {node.output, *node.more_outputs}:
                needed |= set(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        self.reindex()

    def walk(self, op: str) -> Iterator[Node]:
        """A snapshot of the nodes of one operator that are still in the graph."""
        for node in [each for each in self.nodes if each.op == op]:
            if node in self.nodes:
                yield node


def _value(attribute: Any) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
