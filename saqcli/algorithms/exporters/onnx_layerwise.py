"""Proof by parts: every layer of an ONNX graph, fed what PyTorch feeds it, returns what PyTorch returns.

End to end the two cannot agree to the last bit: they sum in different orders, an activation on the edge
between two codes then falls to the other side, and in a deep network one such step becomes thousands further
on. So the graph is cut open at the input of every activation quantizer. There it gets PyTorch's tensor, and
the tensor that it would have used itself is compared with it: nothing but summation order lies between two
cuts, so they must agree to rounding error.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from saqcli.algorithms.exporters.operators import ExportedInput
from saqcli.quant.grids import Grid

LARGEST_ERROR = 1e-4  # of a tensor's largest magnitude; float32 sums of up to 10**5 products stay well below
_PREFIX = "fed_"


@dataclass(frozen=True)
class LayerwiseCheck:
    """How the parts compare.

    Attributes:
        tensors: compared: the input of every quantizer, and the logits.
        largest_error: of any of them, relative to its largest magnitude.
        problem: why the parts cannot be compared, or None.
    """

    tensors: int
    largest_error: float
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether all parts agree to rounding error."""
        return self.problem is None and self.largest_error <= LARGEST_ERROR


@dataclass(frozen=True)
class _Call:
    """One call of an activation quantizer in PyTorch.

    Attributes:
        source: its input, kept so that its memory is not used again; later layers may write into it.
        x: a copy of it, limited to the range of the grid: the graph may merge that limit with a ReLU before it.
        step: of the quantizer.
        grid: likewise.
    """

    source: Tensor
    x: Tensor
    step: float
    grid: Grid

    def limited(self, values: Any) -> Any:
        """``values`` limited to the range of the grid."""
        return np.clip(values, self.step * self.grid.lowest, self.step * self.grid.highest)


@torch.no_grad()
def check_layers(path: Path, frozen: nn.Module, images: Tensor) -> LayerwiseCheck:
    """Compare the graph at ``path`` with the frozen model it was exported from, part by part.

    Args:
        path: written by ``OnnxQdqExporter``.
        frozen: from ``frozen_copy``.
        images: (N, C, H, W); all activations of the batch are held in memory.
    """
    calls: list[_Call] = []
    handles = [
        module.register_forward_hook(lambda m, inputs, _: calls.append(_call(m, inputs)))
        for module in frozen.modules()
        if isinstance(module, ExportedInput)
    ]
    try:
        logits = frozen(images)
    finally:
        for handle in handles:
            handle.remove()
    graph = onnx.load(str(path))
    quantizers = _activation_quantizers(graph.graph)
    if len(quantizers) != len(calls):
        calls = _without_repeats(calls)
    if len(quantizers) != len(calls):
        problem = f"the graph quantizes {len(quantizers)} activations, the model {len(calls)}"
        return LayerwiseCheck(0, float("inf"), problem)
    compared = _cut(graph, quantizers, calls)
    errors = []
    for level in (ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
        answers = _run(graph, images, calls, level)
        errors += [
            _relative(calls[index].x.numpy(), calls[index].limited(answers[name]))
            for index, name in compared.items()
        ]
        errors.append(_relative(logits.numpy(), answers[graph.graph.output[0].name]))
    return LayerwiseCheck(len(compared) + 1, max(errors))


def _call(module: ExportedInput, inputs: tuple[Tensor, ...]) -> _Call:
    step, grid = float(module.step), module.grid
    return _Call(inputs[0], inputs[0].clamp(step * grid.lowest, step * grid.highest), step, grid)


def _without_repeats(calls: list[_Call]) -> list[_Call]:
    """The exporter merges equal nodes: quantizers of equal steps that read the same tensor are one node."""
    kept: dict[tuple[int, float, Grid], _Call] = {}
    for call in calls:
        kept.setdefault((call.source.data_ptr(), call.step, call.grid), call)
    return list(kept.values())


def _activation_quantizers(graph: Any) -> list[Any]:
    """QuantizeLinear nodes in order; weights are constants and have none."""
    return [node for node in graph.node if node.op_type == "QuantizeLinear"]


def _cut(graph: Any, quantizers: list[Any], calls: list[_Call]) -> dict[int, str]:
    """Make the input of every quantizer a graph input, and its own tensor an output; which call belongs to which."""
    given = {value.name for value in graph.graph.input}
    compared: dict[int, str] = {}
    for index, (node, call) in enumerate(zip(quantizers, calls, strict=True)):
        own, name = node.input[0], f"{_PREFIX}{index}"
        node.input[0] = name
        # Fixed sizes would let ONNX Runtime 1.31 turn MatMul and Add into Gemm with a quantizer of the wrong type.
        shape = [f"{name}_{dim}" for dim in range(call.x.dim())]
        graph.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
        if own not in given:
            compared[index] = own
    for own in dict.fromkeys(compared.values()):
        if own != graph.graph.output[0].name:
            graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(own))
    return compared


def _run(graph: Any, images: Tensor, calls: list[_Call], level: Any) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {graph.graph.input[0].name: images.numpy()}
    feed |= {f"{_PREFIX}{index}": call.x.numpy() for index, call in enumerate(calls)}
    wanted = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    answers = session.run(names, {name: value for name, value in feed.items() if name in wanted})
    return dict(zip(names, answers, strict=True))


def _relative(truth: Any, answer: Any) -> float:
    if truth.shape != answer.shape:
        return float("inf")
    largest = float(np.abs(truth).max())
    error = float(np.abs(truth - answer).max()) / (largest or 1.0)
    return error if np.isfinite(error) else float("inf")
