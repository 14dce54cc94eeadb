"""Layerwise proof: an ONNX graph cut behind every quantizer, compared with PyTorch code by code.

An ONNX graph, cut open behind every activation quantizer: PyTorch's codes go in, the graph's own come out.

Proof by parts: every layer of an ONNX graph, fed what PyTorch feeds it, hands on the codes that PyTorch hands on.

End to end the two cannot agree to the last bit: they sum in different orders, an activation on the edge
between two codes then falls to the other side, and in a deep network one such step becomes thousands further
on. So the graph is cut open behind every activation quantizer. There it gets PyTorch's codes, and the codes
that it would have used itself are compared with them. Between two cuts lies nothing but summation order: a
code may differ by one step, and only where PyTorch's own number lies on the edge between the two to within
rounding error: 1e-4 of the largest magnitude, or more where PyTorch itself is further from float64 (a norm that
takes a large mean away leaves little but rounding errors).

Cut there, each part is quantized on both sides, as in the whole graph, so what a runtime's optimizer does to it shows.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from saqcli.export import onnx_helpers
from saqcli.export.integer_kernels import LARGEST_SHIFT, SAME_CODES
from saqcli.export.operators import FrozenInput
from saqcli.quant.grid import Grid, codes_of

LARGEST_ERROR = 1e-4  # of a tensor's largest magnitude; float32 sums of up to 10**5 products stay well below
HARMLESS = (
    2 * LARGEST_SHIFT
)  # of a step: where images use little of a range, a rounded bias is more than rounding error
LARGEST_OWN_ERROR = 1e-2  # however far PyTorch is from float64
AS_PYTORCH = 4.0  # times PyTorch's own error: two runtimes round apart, and one of them may be the luckier
_FED = "fed_"
_QUANTIZERS = ("QuantizeLinear", "IntQuant")


@dataclass
class Call:
    """One call of an activation quantizer in PyTorch.

    Attributes:
        x: a copy of its input, since later layers may write into it.
        codes: that stand for it, in float32.
        step: of the quantizer.
        grid: likewise.
        own_error: of ``x`` itself: how far it is, relative to its largest magnitude, from what float64 gives for the
            same codes of the layers before.
    """

    x: Any
    codes: Any
    step: float
    grid: Grid
    own_error: float = 0.0

    @property
    def allowed(self) -> float:
        """The error that rounding explains, or that next to no code notices, relative to the largest magnitude."""
        unfelt = HARMLESS * self.step / self.magnitude if self.magnitude else 0.0
        return max(LARGEST_ERROR, min(AS_PYTORCH * self.own_error, LARGEST_OWN_ERROR), unfelt)

    @property
    def magnitude(self) -> float:
        """The largest, where codes change."""
        return float(np.abs(self.limited(self.x)).max(initial=0.0))

    def limited(self, values: Any) -> Any:
        """``values`` limited to where codes change: beyond is the last code, and a Clip or ReLU may be merged."""
        return np.clip(values, self.step * (self.grid.lowest + 0.5), self.step * (self.grid.highest - 0.5))


@dataclass
class Cut:
    """A quantizer of the graph, and the call of PyTorch that it stands for.

    Attributes:
        layer: that it tells.
        call: of PyTorch.
        before: name of the tensor that is quantized; None where copies of the quantizer stand in front of it.
        after: name of the tensor that is cut: codes, or quantized values.
        fed: name of the graph input that takes its place.
        unit: value of a difference of one code in ``after``.
        zero: what stands for code 0 there.
        dtype: of ``after``.
        pads: zeros around ``after``, before and behind every dimension.
        results: flipped and wrong codes of every run.
        error: of the tensor before it is quantized.
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
        """PyTorch's codes, as the graph has them."""
        codes = np.pad(self.call.codes, self.pads) if self.pads else self.call.codes
        if self.dtype == np.float32:
            return codes * np.float32(self.unit)
        return (codes + np.float32(self.zero)).astype(self.dtype)

    def judge(self, answer: Any) -> None:
        """Count the codes of ``answer`` that differ, and those that no rounding explains."""
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
        edge = (found.flat[where].astype(np.float64) + truth.flat[where]) / 2 * call.step
        off = np.abs(x.flat[where] - edge)
        allowed = call.allowed * call.magnitude
        wrong = int(((apart > 1) | (off > allowed)).sum())
        self.results.append((len(where) - wrong, wrong))

    def compare(self, answer: Any) -> None:
        """Take the error of the tensor before it is quantized."""
        self.error = max(self.error, relative(self.call.limited(self.call.x), self.call.limited(answer)))


class Unmatched(Exception):
    """The graph and the model do not have the same quantizers, or the parts do not run."""


@contextmanager
def recorded(frozen: nn.Module) -> Iterator[dict[str, list[Call]]]:
    """The calls of every activation quantizer, by layer, filled while the model runs."""
    calls: dict[str, list[Call]] = defaultdict(list)

    def record(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, FrozenInput)
        (x,) = inputs
        codes = codes_of(x, module.step, module.grid).numpy()
        calls[module.layer].append(Call(x.numpy().copy(), codes, float(module.step), module.grid))

    handles = [
        module.register_forward_hook(record) for module in frozen.modules() if isinstance(module, FrozenInput)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def own_errors(frozen: nn.Module, images: Tensor, calls: dict[str, list[Call]], logits: Any) -> float:
    """Note for every call how far PyTorch's float32 is from float64 on the same codes.

    Returns:
        The same for the logits, (N, classes).
    """
    double = copy.deepcopy(frozen).double()
    done: dict[str, int] = defaultdict(int)

    def feed(module: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> Tensor:
        assert isinstance(module, FrozenInput)
        call = calls[module.layer][done[module.layer]]
        done[module.layer] += 1
        call.own_error = relative(call.limited(inputs[0].numpy()), call.limited(call.x))
        return torch.from_numpy(call.codes).double() * module.step

    for module in double.modules():
        if isinstance(module, FrozenInput):
            module.register_forward_hook(feed)
    try:
        return relative(double(images.double()).numpy(), logits)
    except RuntimeError:  # its forward makes or asks for float32
        return 0.0


def cut_open(graph: Any, calls: dict[str, list[Call]]) -> list[Cut]:
    """Put a graph input in the place of what comes out of every activation quantizer."""
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    quantizers = [node for node in graph.node if _quantizes_input(node)]
    counts = Counter(_first_layer(node) for node in quantizers)
    matched = {layer: iter(_matching(layer, calls.get(layer, []), count)) for layer, count in counts.items()}
    cuts: list[Cut] = []
    made_by = {node.output[0]: node for node in graph.node}
    for node in quantizers:
        told = _told(node)
        name, call = told[onnx_helpers.LAYER], next(matched[_first_layer(node)])
        cut = Cut(name, call, _head(node, name, made_by), node.output[0], f"{_FED}{len(cuts)}")
        if onnx_helpers.PADS in told:
            pads = [int(pad) for pad in told[onnx_helpers.PADS].split(",")]
            cut.pads = list(zip(pads[: len(pads) // 2], pads[len(pads) // 2 :], strict=True))
        if node.op_type == "QuantizeLinear":
            zero = constants[node.input[2]]
            cut.dtype, cut.zero = zero.dtype, float(told.get(onnx_helpers.ZERO, zero))
        else:
            cut.unit = float(constants[node.input[1]])
        cuts.append(cut)
    quantized = {name for cut in cuts for name in cut.layer.split(onnx_helpers.LAYER_SEPARATOR)}
    present = {
        name
        for node in graph.node
        for name in _told(node).get(onnx_helpers.LAYER, "").split(onnx_helpers.LAYER_SEPARATOR)
    }
    for name in calls:  # a layer whose output nothing uses is not in the graph at all
        if name not in quantized and name in present:
            raise Unmatched(f"the graph does not quantize the input of {name}")
    _feed(graph, cuts)
    return cuts


def _quantizes_input(node: Any) -> bool:
    told = _told(node)
    return (
        told.get(onnx_helpers.OPERAND) == "input"
        and onnx_helpers.COPY not in told
        and node.op_type in _QUANTIZERS
    )


def _first_layer(node: Any) -> str:
    """That of those that share a quantizer of the graph under whose name its calls are found."""
    return _told(node)[onnx_helpers.LAYER].split(onnx_helpers.LAYER_SEPARATOR)[0]


def _matching(layer: str, calls: list[Call], count: int) -> list[Call]:
    """The calls that ``count`` quantizers of the graph stand for, in their order.

    Raises:
        Unmatched: as many there are not.
    """
    distinct = _distinct(calls)
    if count == len(calls):  # equal tensors too, where the graph does not know that they are
        return calls
    if count != len(distinct):
        more = "more" if count > len(distinct) else "less"
        raise Unmatched(f"the graph quantizes the input of {layer} {more} often than the model")
    return distinct


def _head(node: Any, layer: str, made_by: dict[str, Any]) -> str | None:
    """What a quantizer is given, in front of the Clip, Pad and Sub that prepare it; None if it is quantized already."""
    while True:
        name: str = node.input[0]
        node = made_by.get(name)
        if node is None or _told(node).get(onnx_helpers.LAYER) != layer:
            break
    while node is not None and node.op_type in SAME_CODES:
        node = made_by.get(node.input[0])
    return None if node is not None and onnx_helpers.COPY in _told(node) else name


def _told(node: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def _distinct(calls: list[Call]) -> list[Call]:
    """Without repeats of equal tensors, which the exporter merges."""
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
    """Run the graph, cut open; what comes out of every quantizer, and of ``more`` tensors."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    del opened.graph.value_info[:]  # fixed sizes again, where a layer is fed a table of numbers
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
    except Exception as error:  # onnxruntime has a class for every reason, none of them public
        reason = " ".join(str(error).split())[:200]
        raise Unmatched(f"ONNX Runtime does not run it in parts: {reason}") from None
    known = {name: feed[name] for name in more & given if name in feed}
    for each in opened.graph.initializer:  # a layer may be fed a table of numbers: relative positions
        if each.name in more:
            known[each.name] = onnx.numpy_helper.to_array(each)
    return dict(zip(names, answers, strict=True)) | known


def relative(truth: Any, answer: Any) -> float:
    """The largest difference, relative to the largest magnitude of ``truth``; infinite where there is none."""
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
    """The input of one quantized layer, as the graph computes it from PyTorch's codes of the layers before.

    Attributes:
        layer: or layers that share the quantizer.
        codes: compared, over both levels of optimization.
        flipped: that differ, all by one step and all on an edge.
        wrong: that differ otherwise.
        largest_error: of the tensor before it is quantized, without optimizations, relative to its largest magnitude.
        allowed: of that, what rounding explains.
    """

    layer: str
    codes: int
    flipped: int
    wrong: int
    largest_error: float
    allowed: float = LARGEST_ERROR


@dataclass(frozen=True)
class LayerwiseCheck:
    """How the parts compare.

    Attributes:
        layers: in execution order.
        logits_error: of the logits, relative to their largest magnitude; the worse of the two levels.
        logits_allowed: of that, what rounding explains.
        problem: why the parts cannot be compared, or None.
    """

    layers: tuple[LayerCheck, ...] = ()
    logits_error: float = float("inf")
    logits_allowed: float = LARGEST_ERROR
    problem: str | None = None

    @property
    def largest_error(self) -> float:
        """Of any tensor."""
        return max([layer.largest_error for layer in self.layers] + [self.logits_error])

    @property
    def codes(self) -> int:
        """How many were compared."""
        return sum(layer.codes for layer in self.layers)

    @property
    def flipped(self) -> int:
        """How many fell to the other side of an edge."""
        return sum(layer.flipped for layer in self.layers)

    @property
    def wrong(self) -> tuple[str, ...]:
        """Layers with codes that no rounding explains, or a tensor that is off."""
        return tuple(
            each.layer for each in self.layers if each.wrong or not each.largest_error <= each.allowed
        )

    @property
    def passed(self) -> bool:
        """Whether all parts agree to rounding error."""
        return self.problem is None and not self.wrong and self.logits_error <= self.logits_allowed


@torch.no_grad()
def check_layers(path: Path, frozen: nn.Module, images: Tensor) -> LayerwiseCheck:
    """Compare the graph at ``path`` with the frozen model it was exported from, part by part.

    Args:
        path: written by one of ``EXPORTERS``.
        frozen: from ``frozen_copy``.
        images: (N, C, H, W); all activations of the batch are held in memory.
    """
    with recorded(frozen) as calls:
        logits = frozen(images).numpy()
    own = own_errors(frozen, images, calls, logits)
    model = onnx.load(str(path))
    graph = model.graph
    output = graph.output[0].name
    worst = 0.0
    try:
        cuts = cut_open(graph, calls)
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
    allowed = max(LARGEST_ERROR, min(AS_PYTORCH * own, LARGEST_OWN_ERROR))
    return LayerwiseCheck(tuple(_check(cut) for cut in cuts), worst, allowed)


def _check(cut: Cut) -> LayerCheck:
    flipped, wrong = (sum(result[k] for result in cut.results) for k in (0, 1))
    return LayerCheck(
        cut.layer, cut.call.x.size * len(cut.results), flipped, wrong, cut.error, cut.call.allowed
    )
