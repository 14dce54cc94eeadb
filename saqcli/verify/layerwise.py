"""Layerwise proof: a graph cut at every quantizer, compared code by code.

End to end, graph and PyTorch cannot agree to the last bit: they sum in different orders, an activation on the edge
between two codes is then rounded to the other side, and in a deep network one such step becomes thousands in later
layers. Therefore the graph is cut after every activation quantizer. There it is fed PyTorch's codes, and the codes it
computed itself are compared with them. Between two cuts only summation order differs: a code may differ by one step,
and only where PyTorch's value lies on the edge between the two within rounding error: 1e-4 of the largest magnitude, or
more where PyTorch itself is further from float64 (a norm that subtracts a large mean leaves little but rounding
errors).

Each part keeps its quantizers on both sides, as in the whole graph, so changes by a runtime's optimizer are detected.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from saqcli.export import onnx_helpers
from saqcli.export.integer.graph import MOVES_CODES
from saqcli.export.integer_kernels import LARGEST_SHIFT
from saqcli.export.operators import FrozenInput
from saqcli.export.style import OnnxStyle, Reader
from saqcli.quant.grid import AnyGrid, LevelTable, codes_of

LARGEST_ERROR = 1e-4  # of a tensor's largest magnitude; float32 sums of up to 10**5 products stay well below
HARMLESS = (
    2 * LARGEST_SHIFT
)  # of a step; a rounded bias exceeds rounding error where images use little of a range
LARGEST_FLOAT32_ERROR = 1e-2  # limit of the allowance for PyTorch's error
PYTORCH_FACTOR = 4.0  # times PyTorch's float32 error is allowed; two runtimes round differently
_FED = "fed_"


@dataclass
class Call:
    """One call of an activation quantizer in PyTorch.

    Attributes:
        x: a copy of its input, since later layers may write into it.
        codes: codes of ``x``, in float32; on a table of levels, their indices.
        step: step of the quantizer.
        grid: grid of the quantizer.
        float32_error: difference of ``x`` from the float64 result for the same codes of earlier layers, relative to
            the largest magnitude.
        limits: the least and the largest code that can occur, where a ReLU or Clip before the quantizer leaves a part
            of the grid.
    """

    x: Any
    codes: Any
    step: float
    grid: AnyGrid
    float32_error: float = 0.0
    limits: tuple[float, float] | None = None

    @property
    def allowed(self) -> float:
        """The error explained by rounding, or too small to matter, relative to the largest magnitude."""
        harmless = HARMLESS * self.step * self._least_gap / self.magnitude if self.magnitude else 0.0
        return max(LARGEST_ERROR, min(PYTORCH_FACTOR * self.float32_error, LARGEST_FLOAT32_ERROR), harmless)

    @property
    def magnitude(self) -> float:
        """The largest magnitude of ``x`` in the range where codes change."""
        return float(np.abs(self.limited(self.x)).max(initial=0.0))

    def limited(self, values: Any) -> Any:
        """``values`` limited to the range where codes change; beyond it a Clip or ReLU may be merged."""
        grid = self.grid
        if isinstance(grid, LevelTable):
            ends: tuple[Any, Any] = (grid.codes[0] + grid.codes[1]) / 2, (grid.codes[-2] + grid.codes[-1]) / 2
        else:
            least, most = self.limits or (grid.lowest, grid.highest)
            ends = least + 0.5, max(most - 0.5, least + 0.5)
        return np.clip(values, self.step * ends[0], self.step * ends[1])

    def edges(self, one: Any, other: Any) -> Any:
        """The values halfway between two arrays of codes."""
        one, other = one.astype(np.float64), other.astype(np.float64)
        if isinstance(self.grid, LevelTable):
            table = np.array(self.grid.codes)
            one, other = (table[each.astype(np.int64).clip(0, len(table) - 1)] for each in (one, other))
        return (one + other) / 2 * self.step

    @property
    def _least_gap(self) -> float:
        """The least distance between neighboring codes."""
        if isinstance(self.grid, LevelTable):
            return min(high - low for low, high in pairwise(self.grid.codes))
        return 1.0


@dataclass
class Cut:
    """A quantizer of the graph, and the corresponding call in PyTorch.

    Attributes:
        layer: layer in its annotations.
        call: the call in PyTorch.
        before: name of the tensor that is quantized; None if copies of the quantizer, or another one, precede it.
        after: name of the tensor that is cut: codes, or quantized values.
        fed: name of the graph input that replaces it.
        unit: value of a difference of one code in ``after``.
        zero: zero point of ``after``.
        dtype: type of ``after``.
        pads: zero padding of ``after``, before and after every dimension.
        results: flipped and wrong codes of every run.
        error: error of the tensor before quantization.
    """

    layer: str
    call: Call
    before: str | None
    after: str
    fed: str
    unit: float = 1.0
    zero: float = 0.0
    dtype: Any = np.float32
    pads: list[tuple[int, int]] = field(default_factory=list)
    results: list[tuple[int, int]] = field(default_factory=list)
    error: float = 0.0

    def feed(self) -> Any:
        """PyTorch's codes in the format of the graph."""
        codes = np.pad(self.call.codes, self.pads) if self.pads else self.call.codes
        if self.dtype == np.float32:
            return codes * np.float32(self.unit)
        return (codes + np.float32(self.zero)).astype(self.dtype)

    def judge(self, answer: Any) -> None:
        """Count the codes of ``answer`` that differ, and those that rounding does not explain."""
        call = self.call
        truth, x = (np.pad(each, self.pads) if self.pads else each for each in (call.codes, call.x))
        if self.dtype == np.float32:
            found = np.round(answer / self.unit)
        else:
            found = answer.astype(np.float32) - np.float32(self.zero)
        if found.shape != truth.shape or not np.isfinite(found).all():
            self.results.append((0, truth.size))
            return
        differs = found != truth
        where = np.flatnonzero(differs)
        apart = np.abs(found.flat[where] - truth.flat[where])
        edge = call.edges(found.flat[where], truth.flat[where])
        off = np.abs(x.flat[where] - edge)
        allowed = call.allowed * call.magnitude
        wrong = int(((apart > 1) | (off > allowed)).sum())
        self.results.append((len(where) - wrong, wrong))

    def compare(self, answer: Any) -> None:
        """Record the error of the tensor before quantization."""
        self.error = max(self.error, relative(self.call.limited(self.call.x), self.call.limited(answer)))


class Unmatched(Exception):
    """The quantizers of graph and model differ, or the cut graph does not run."""


@contextmanager
def recorded(frozen: nn.Module) -> Iterator[dict[str, list[Call]]]:
    """The calls of every activation quantizer, by layer, recorded while the model runs."""
    calls: dict[str, list[Call]] = defaultdict(list)

    def record(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, FrozenInput)
        (x,) = inputs
        codes = codes_of(x, module.step, module.grid)
        if isinstance(module.grid, LevelTable):
            codes = module.grid.indices(codes).float()
        calls[module.layer].append(Call(x.numpy().copy(), codes.numpy(), float(module.step), module.grid))

    handles = [
        module.register_forward_hook(record) for module in frozen.modules() if isinstance(module, FrozenInput)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def fed(
    model: nn.Module, calls: Mapping[str, list[Call]], see: Callable[[Call, FrozenInput, Tensor], None]
) -> Iterator[None]:
    """Within the context every activation quantizer returns the codes of its recorded call, whatever its input is.

    Args:
        model: a copy of the model of ``calls``, of any type; quantizers that only it has act as always.
        calls: from ``recorded``.
        see: is given each call, the quantizer and its input in ``model``.
    """
    done: dict[str, int] = defaultdict(int)

    def feed(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor | None:
        assert isinstance(module, FrozenInput)
        if module.layer not in calls:
            return None
        call = calls[module.layer][done[module.layer]]
        done[module.layer] += 1
        see(call, module, inputs[0])
        codes = torch.from_numpy(call.codes)
        if isinstance(module.grid, LevelTable):
            codes = module.grid.codes_at(codes)
        return codes.to(inputs[0].dtype) * module.step

    handles = [
        module.register_forward_hook(feed) for module in model.modules() if isinstance(module, FrozenInput)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_float32_errors(
    frozen: nn.Module, images: Tensor, calls: dict[str, list[Call]], logits: Any
) -> float:
    """Set the error of PyTorch's float32 relative to float64 on the same codes, for every call.

    Returns:
        The error of the logits, (N, classes).
    """
    double = copy.deepcopy(frozen).double()

    def see(call: Call, _: FrozenInput, x: Tensor) -> None:
        call.float32_error = relative(call.limited(x.numpy()), call.limited(call.x))

    try:
        with fed(double, calls, see):
            return relative(double(images.double()).numpy(), logits)
    except RuntimeError:  # its forward creates or requires float32
        return 0.0


@dataclass
class MovedCodes:
    """Codes of the model that a file is compared with, where they differ from those of the trained model.

    Attributes:
        codes: number of codes.
        differing: number of codes that differ, each layer on the same codes of earlier layers.
        largest: largest difference.
    """

    codes: int = 0
    differing: int = 0
    largest: int = 0


@torch.no_grad()
def moved_codes(frozen: nn.Module, form: nn.Module, images: Tensor) -> MovedCodes:
    """Compare the codes of ``form``, which has the same quantizers, with those of the trained model, layer by layer."""
    found = MovedCodes()

    def see(call: Call, module: FrozenInput, x: Tensor) -> None:
        codes = codes_of(x, module.step, module.grid)
        if isinstance(module.grid, LevelTable):
            codes = module.grid.indices(codes).float()
        apart = np.abs(codes.numpy() - call.codes)
        found.codes += apart.size
        found.differing += int((apart > 0).sum())
        found.largest = max(found.largest, int(apart.max(initial=0)))

    with recorded(frozen) as calls:
        frozen(images)
    with fed(form, calls, see):
        form(images)
    return found


def cut_open(graph: Any, calls: dict[str, list[Call]], readers: Mapping[str, Reader]) -> list[Cut]:
    """Replace the output of every activation quantizer, an operator of ``readers``, by a graph input."""
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type in readers and _quantizes_input(node)]
    quantizers.sort(key=lambda node: int(_annotations(node).get(onnx_helpers.ORDER, -1)))
    counts = Counter(_first_layer(node) for node in quantizers)
    matched = {layer: iter(_matching(layer, calls.get(layer, []), count)) for layer, count in counts.items()}
    cuts: list[Cut] = []
    made_by = {node.output[0]: node for node in graph.node}
    for node in quantizers:
        annotations = _annotations(node)
        name, call = annotations[onnx_helpers.LAYER], next(matched[_first_layer(node)])
        coding = readers[node.op_type](node, constants)
        source, fed = _source(node, name, made_by), f"{_FED}{len(cuts)}"
        call.limits = coding.limits
        cut = Cut(name, call, source, node.output[0], fed, coding.unit, coding.zero, coding.dtype)
        if onnx_helpers.PADS in annotations:
            pads = [int(pad) for pad in annotations[onnx_helpers.PADS].split(",")]
            cut.pads = list(zip(pads[: len(pads) // 2], pads[len(pads) // 2 :], strict=True))
        cuts.append(cut)
    quantized = {name for cut in cuts for name in cut.layer.split(onnx_helpers.LAYER_SEPARATOR)}
    present = {
        name
        for node in graph.node
        for name in _annotations(node).get(onnx_helpers.LAYER, "").split(onnx_helpers.LAYER_SEPARATOR)
    }
    if calls and not any(present):
        raise Unmatched("no node of the graph is annotated with its layer")
    for name in calls:  # a layer with an unused output is not in the graph
        if name not in quantized and name in present:
            raise Unmatched(f"the graph does not quantize the input of {name}")
    _feed(graph, cuts)
    return cuts


def _quantizes_input(node: Any) -> bool:
    annotations = _annotations(node)
    return annotations.get(onnx_helpers.OPERAND) == "input" and onnx_helpers.COPY not in annotations


def _first_layer(node: Any) -> str:
    """The first of the layers that share a quantizer; the name under which its calls are found."""
    return _annotations(node)[onnx_helpers.LAYER].split(onnx_helpers.LAYER_SEPARATOR)[0]


def _matching(layer: str, calls: list[Call], count: int) -> list[Call]:
    """The calls that correspond to ``count`` quantizers of the graph, in order.

    Raises:
        Unmatched: the numbers differ.
    """
    distinct = _distinct(calls)
    if count == len(calls):  # including equal tensors that the exporter did not merge
        return calls
    if count != len(distinct):
        more = "more" if count > len(distinct) else "less"
        raise Unmatched(f"the graph quantizes the input of {layer} {more} often than the model")
    return distinct


def _source(node: Any, layer: str, made_by: dict[str, Any]) -> str | None:
    """The input of a quantizer before its Clip, Pad and Sub; None if it is already quantized."""
    while True:
        name: str = node.input[0]
        node = made_by.get(name)
        if node is None or _annotations(node).get(onnx_helpers.LAYER) != layer:
            break
    while node is not None and node.op_type in MOVES_CODES:
        node = made_by.get(node.input[0])
    quantized = node is not None and _annotations(node).get(onnx_helpers.OPERAND) == "input"
    return None if quantized else name


def _annotations(node: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _distinct(calls: list[Call]) -> list[Call]:
    """The calls without repeated equal tensors, which the exporter merges."""
    kept: list[Call] = []
    for call in calls:
        if not any(call.x.shape == one.x.shape and np.array_equal(call.x, one.x) for one in kept):
            kept.append(call)
    return kept


def _feed(graph: Any, cuts: list[Cut]) -> None:
    fed = {cut.after: cut.fed for cut in cuts}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in fed:
                node.input[index] = fed[name]
    for cut in cuts:
        # Fixed sizes would let ONNX Runtime 1.31 turn MatMul and Add into Gemm with a quantizer of the wrong type.
        shape = [f"{cut.fed}_{dim}" for dim in range(cut.call.x.ndim)]
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(cut.dtype))
        graph.input.append(onnx.helper.make_tensor_value_info(cut.fed, kind, shape))


def run(model: Any, images: Tensor, cuts: list[Cut], more: set[str], level: Any) -> dict[str, Any]:
    """Run the cut graph; the outputs of every quantizer, and ``more`` tensors, by name."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    del opened.graph.value_info[:]  # fixed sizes, of layers that read a constant table
    given = {value.name for value in opened.graph.input} | {each.name for each in opened.graph.initializer}
    present = {value.name for value in opened.graph.output}
    for name in dict.fromkeys([cut.after for cut in cuts] + sorted(more)):
        if name not in present and name not in given:
            opened.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    feed = {opened.graph.input[0].name: images.numpy()} | {cut.fed: cut.feed() for cut in cuts}
    try:
        session = ort.InferenceSession(
            opened.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        wanted = {value.name for value in session.get_inputs()}
        names = [value.name for value in session.get_outputs()]
        answers = session.run(names, {name: value for name, value in feed.items() if name in wanted})
    except Exception as error:  # the exception classes of onnxruntime are not public
        reason = " ".join(str(error).split())[:200]
        raise Unmatched(f"ONNX Runtime cannot run the cut graph: {reason}") from None
    known = {name: feed[name] for name in more & given if name in feed}
    for each in opened.graph.initializer:  # a layer may read a constant table, of relative positions
        if each.name in more:
            known[each.name] = onnx.numpy_helper.to_array(each)
    return dict(zip(names, answers, strict=True)) | known


def relative(truth: Any, answer: Any) -> float:
    """The largest difference relative to the largest magnitude of ``truth``; infinite if undefined."""
    if truth.shape != answer.shape:
        return float("inf")
    largest = float(np.abs(truth).max(initial=0.0))
    error = float(np.abs(truth - answer).max(initial=0.0)) / (largest or 1.0)
    return error if np.isfinite(error) else float("inf")


LEVELS = {
    "unoptimized": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "optimized": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
__all__ = ["LARGEST_ERROR", "LayerCheck", "LayerwiseCheck", "check_layers"]


@dataclass(frozen=True)
class LayerCheck:
    """The input of one quantized layer, as the graph computes it from PyTorch's codes of earlier layers.

    Attributes:
        layer: name of the layer, or of all layers that share the quantizer.
        codes: number of codes compared, over both optimization levels.
        flipped: number of codes that differ by one step on an edge.
        wrong: number of codes that differ otherwise.
        largest_error: error of the tensor before quantization, without optimizations, relative to its largest
            magnitude.
        allowed: limit of ``largest_error`` explained by rounding.
    """

    layer: str
    codes: int
    flipped: int
    wrong: int
    largest_error: float
    allowed: float = LARGEST_ERROR


@dataclass(frozen=True)
class LayerwiseCheck:
    """The comparison of all layers.

    Attributes:
        layers: checks in execution order.
        logits_error: error of the logits relative to their largest magnitude; the larger of both optimization levels.
        logits_allowed: limit of ``logits_error`` explained by rounding.
        problem: why the layers cannot be compared, or None.
    """

    layers: tuple[LayerCheck, ...] = ()
    logits_error: float = float("inf")
    logits_allowed: float = LARGEST_ERROR
    problem: str | None = None

    @property
    def largest_error(self) -> float:
        """The largest error of any tensor."""
        return max([layer.largest_error for layer in self.layers] + [self.logits_error])

    @property
    def codes(self) -> int:
        """Number of codes compared."""
        return sum(layer.codes for layer in self.layers)

    @property
    def flipped(self) -> int:
        """Number of codes on the other side of an edge."""
        return sum(layer.flipped for layer in self.layers)

    @property
    def wrong(self) -> tuple[str, ...]:
        """Layers with codes or a tensor error that rounding does not explain."""
        return tuple(
            each.layer for each in self.layers if each.wrong or not each.largest_error <= each.allowed
        )

    @property
    def passed(self) -> bool:
        """Whether all layers agree within rounding error."""
        return self.problem is None and not self.wrong and self.logits_error <= self.logits_allowed


@torch.no_grad()
def check_layers(
    path: Path, frozen: nn.Module, images: Tensor, readers: Mapping[str, Reader] = OnnxStyle.quantizers
) -> LayerwiseCheck:
    """Compare the graph at ``path`` with the frozen model it was exported from, layer by layer.

    Args:
        path: ONNX file.
        frozen: from ``frozen_copy``.
        images: (N, C, H, W); all activations of the batch are held in memory.
        readers: ``quantizers`` of the style of the file.
    """
    with recorded(frozen) as calls:
        logits = frozen(images).numpy()
    float32_error = measure_float32_errors(frozen, images, calls, logits)
    model = onnx.load(str(path))
    graph = model.graph
    output = graph.output[0].name
    worst = 0.0
    try:
        cuts = cut_open(graph, calls, readers)
        for level, setting in LEVELS.items():
            befores = {cut.before for cut in cuts if cut.before} if level == "unoptimized" else set()
            answers = run(model, images, cuts, befores | {output}, setting)
            for cut in cuts:
                cut.judge(answers[cut.after])
                if befores and cut.before:
                    cut.compare(answers[cut.before])
            worst = max(worst, relative(logits, answers[output]))
    except Unmatched as error:
        return LayerwiseCheck(problem=str(error))
    allowed = max(LARGEST_ERROR, min(PYTORCH_FACTOR * float32_error, LARGEST_FLOAT32_ERROR))
    return LayerwiseCheck(tuple(_check(cut) for cut in cuts), worst, allowed)


def _check(cut: Cut) -> LayerCheck:
    flipped, wrong = (sum(result[k] for result in cut.results) for k in (0, 1))
    return LayerCheck(
        cut.layer, cut.call.x.size * len(cut.results), flipped, wrong, cut.error, cut.call.allowed
    )
