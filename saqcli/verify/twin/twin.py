"""The twin of a Q/DQ file: what ONNX Runtime computes from it on an x86 CPU, in numpy and PyTorch.

Operators between DequantizeLinear and QuantizeLinear are computed on codes, with the sums, roundings and limits of the
runtime's kernels (``groups``, ``operators``). If nothing else is in the file, its logits have the
same bits.
Operators that stay in floating point are computed as such; those whose last bits depend on an order of summation are
named in ``uncertain``.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from saqcli.verify.twin.floating import CERTAIN, dequantize_linear, evaluate, quantize_linear
from saqcli.verify.twin.graph import DEQUANTIZE, QUANTIZE, Graph, Node
from saqcli.verify.twin.groups import group
from saqcli.verify.twin.operators import OPERATORS, Machine
from saqcli.verify.twin.products import kernel_order, saturating_pairs


class Twin:
    """The arithmetic of ONNX Runtime at default optimization for one file.

    Args:
        path: a Q/DQ ONNX file from one batch of images to logits.
        machine: what of the processor changes results.

    Raises:
        CorruptArtifact: the file is not such a graph.
    """

    def __init__(self, path: str | Path, machine: Machine = Machine()) -> None:
        self.graph = Graph(Path(path))
        self.machine = machine
        self.quantizers = [node.output for node in self.graph.nodes if node.op == QUANTIZE]
        group(self.graph)

    @property
    def kernels(self) -> Counter[str]:
        """Number of operators by type, without QuantizeLinear and DequantizeLinear."""
        return Counter(node.op for node in self.graph.nodes if node.op not in (QUANTIZE, DEQUANTIZE))

    @property
    def uncertain(self) -> tuple[str, ...]:
        """Names of operators in floating point whose last bits depend on an order of summation or an approximation."""
        return tuple(
            node.name for node in self.graph.nodes if node.op not in CERTAIN and node.op not in OPERATORS
        )

    @property
    def exact(self) -> bool:
        """Whether every operation is certain to the last bit."""
        return not self.uncertain

    @property
    def saturating(self) -> tuple[str, ...]:
        """Names of the operators whose products may saturate on x86 processors without VNNI."""
        return tuple(node.name for node in self.graph.nodes if self._saturates(node))

    def _saturates(self, node: Node) -> bool:
        places = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3, "MatMulIntegerToFloat": 1}
        if node.op not in places:
            return False
        weight = self.graph.constants.get(node.inputs[places[node.op]])
        if weight is None:
            return False  # an activation: UINT8 on x86
        if weight.dtype != np.int8:
            return False
        if node.op == "QLinearConv":
            if weight.shape[1] == 1 and int(node.attribute("group", 1)) == len(weight):
                return False
            return bool(saturating_pairs(kernel_order(weight)).any())
        rows = weight if node.op == "QGemm" and node.attribute("transB", 0) else weight.swapaxes(-1, -2)
        return bool(saturating_pairs(rows.reshape(-1, rows.shape[-1])).any())

    def run(self, images: Any, given: dict[str, Any] | None = None) -> Any:
        """Logits, float32 (N, classes).

        Args:
            images: float32 (N, C, H, W), an array or a tensor on the CPU.
            given: tensors to take instead of computing them, by their names in the file.
        """
        return self.trace(images, (), given)[self.graph.output]

    def codes(self, images: Any) -> dict[str, Any]:
        """The codes of every QuantizeLinear of the file, by the name of its output, in its container type."""
        return self.trace(images, self.quantizers)

    def trace(self, images: Any, names: Any, given: dict[str, Any] | None = None) -> dict[str, Any]:
        """Tensors by their names in the file: ``names``, as far as they exist in the runtime, and the logits."""
        graph = self.graph
        wanted = {name: self._final(name) for name in names}
        keep = {*wanted.values(), graph.output}
        left = Counter(name for node in graph.nodes for name in node.inputs)
        fixed = {self._final(name): self._stored(name, value) for name, value in (given or {}).items()}
        values: dict[str, Any] = {graph.input: np.asarray(images, np.float32)}
        for node in graph.nodes:
            if not node.more_outputs and node.output in fixed:
                values[node.output] = fixed[node.output]
            else:
                inputs = [self._value(values, name) for name in node.inputs]
                outputs = evaluate_node(graph, node, inputs, self.machine)
                values.update(zip((node.output, *node.more_outputs), outputs, strict=False))
            for name in node.inputs:
                left[name] -= 1
                if not left[name] and name not in keep:
                    values.pop(name, None)
        found = {
            name: self._restored(name, values[final]) for name, final in wanted.items() if final in values
        }
        found[graph.output] = values[graph.output]
        return found

    def _value(self, values: dict[str, Any], name: str) -> Any:
        if not name:
            return None
        return values[name] if name in values else self.graph.constants[name]

    def _final(self, name: str) -> str:
        """The name under which the runtime stores a tensor of the file."""
        while name in self.graph.renamed:
            name = self.graph.renamed[name]
        return name

    def _stored(self, name: str, value: Any) -> Any:
        if value.dtype == np.int8 and self._final(name) in self.graph.shifted:
            return (value.astype(np.int16) + 128).astype(np.uint8)
        return value

    def _restored(self, name: str, value: Any) -> Any:
        if self._final(name) in self.graph.shifted:
            return (value.astype(np.int16) - 128).astype(np.int8)
        return value


def evaluate_node(graph: Graph, node: Node, values: list[Any], machine: Machine) -> list[Any]:
    """The outputs of one operator of ``graph``.

    Args:
        graph: the graph, for constants.
        node: the operator.
        values: its inputs; None for an absent one.
        machine: what of the processor changes results.

    Raises:
        UnsupportedModel: the operator is unknown.
    """
    if node.op == QUANTIZE:
        return [quantize_linear(graph, node, values)]
    if node.op == DEQUANTIZE:
        return [dequantize_linear(graph, node, values)]
    operator = OPERATORS.get(node.op)
    return [operator(node, values, machine)] if operator is not None else evaluate(graph, node, values)
