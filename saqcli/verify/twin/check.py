"""Is a file the twin's, bit by bit, and how far are the twin's codes from those of the fake-quantized model?

Three comparisons on a few images:

1. Operators that compute on codes are those of the runtime's own optimized graph; each of them, given what the runtime
   gave it, returns the runtime's codes bit by bit.
2. The logits of the whole file have the bits of the twin's. This is certain only where nothing is summed in floating
   point; otherwise their difference is reported.
3. Codes of the twin, from the image on, are compared with those of the fake-quantized model in PyTorch. They differ
   where roundings differ (a requantization for a division, a mean in integers): the share and the largest difference
   of each layer say what integer arithmetic changes.
"""

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from saqcli.export.style import OnnxStyle
from saqcli.serialization import printable
from saqcli.verify.layerwise import cut_open, recorded
from saqcli.verify.runtime import onnx_session, translated_errors
from saqcli.verify.twin.graph import Graph, Node
from saqcli.verify.twin.operators import OPERATORS, Machine
from saqcli.verify.twin.twin import Twin, evaluate_node

RUNTIME = "1.32"  # of ONNX Runtime, with which all operators were compared; later ones may round otherwise and be right
OTHER_PROCESSOR = "the twin has the arithmetic of x86 processors, and this is another"


def knows_runtime() -> bool:
    """Whether the twin was compared with the installed version of ONNX Runtime."""
    return str(ort.__version__).startswith(f"{RUNTIME}.")


@dataclass(frozen=True)
class LayerCodes:
    """The codes of one quantizer, by the twin and by PyTorch, from the image on.

    Attributes:
        layer: layer, or all layers that share the quantizer.
        codes: number of codes.
        differing: number of codes that differ.
        largest: largest difference, in codes.
    """

    layer: str
    codes: int
    differing: int
    largest: int


@dataclass(frozen=True)
class TwinCheck:
    """The comparison of a file with its twin, and of the twin with the model.

    Attributes:
        images: number of images.
        operators: number of operators on codes.
        unlike: operators whose result differs from the runtime's for the same inputs, or that only one of both has.
        floating: operators in floating point whose last bits depend on an order of summation.
        max_abs_diff: largest difference of a logit between file and twin.
        saturating: operators whose products may saturate on x86 processors without VNNI.
        saturates: whether this is such a processor.
        layers: codes of twin and model.
        skipped: why nothing was compared, or None.
    """

    images: int = 0
    operators: int = 0
    unlike: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()
    max_abs_diff: float = 0.0
    saturating: tuple[str, ...] = ()
    saturates: bool = False
    layers: tuple[LayerCodes, ...] = ()
    skipped: str | None = None

    @property
    def equal(self) -> bool | None:
        """Whether all operators have the same bits and, where that is certain, the logits; None if skipped."""
        if self.skipped is not None:
            return None
        return not self.unlike and (self.max_abs_diff == 0 or bool(self.floating))

    @property
    def failed(self) -> bool:
        """Whether file and twin differ, or the twin cannot compute the file although it knows the processor."""
        return self.equal is False or self.skipped not in (None, OTHER_PROCESSOR)

    @property
    def saturated(self) -> bool:
        """Whether products may have saturated here."""
        return self.saturates and bool(self.saturating)

    @property
    def codes(self) -> int:
        """Number of codes compared with the model."""
        return sum(each.codes for each in self.layers)

    @property
    def differing(self) -> int:
        """Number of codes that differ from the model's."""
        return sum(each.differing for each in self.layers)

    @property
    def farthest(self) -> LayerCodes | None:
        """The layer with the largest share of codes that differ; None if none differs."""
        differing = [each for each in self.layers if each.differing]
        return max(differing, key=lambda each: each.differing / each.codes, default=None)

    def figures(self) -> dict[str, Any]:
        """The figures for JSON output."""
        farthest = self.farthest
        return {
            "equal": self.equal,
            "images": self.images,
            "operators": self.operators,
            "unlike": list(self.unlike),
            "floating": list(self.floating),
            "max_abs_diff": self.max_abs_diff,
            "saturating": list(self.saturating),
            "codes": self.codes,
            "differing_codes": self.differing,
            "largest_code_difference": max((each.largest for each in self.layers), default=0),
            "farthest_layer": farthest.layer if farthest is not None else None,
            "skipped": self.skipped,
        }

    def per_layer(self) -> list[dict[str, Any]]:
        """The layers for the verdict file."""
        return [
            {"layer": each.layer, "codes": each.codes, "differing": each.differing, "largest": each.largest}
            for each in self.layers
        ]


@dataclass
class _Optimized:
    """The runtime's optimized graph, with the tensors around its operators on codes."""

    graph: Graph
    tensors: dict[str, Any] = field(default_factory=dict)

    @property
    def operators(self) -> list[Node]:
        return [node for node in self.graph.nodes if node.op in OPERATORS]


@torch.no_grad()
def check_twin(
    path: Path, frozen: nn.Module, images: Tensor, style: OnnxStyle, machine: Machine | None = None
) -> TwinCheck | None:
    """Compare the file at ``path`` with its twin, and the twin with the frozen model.

    Args:
        path: ONNX file.
        frozen: from ``frozen_copy``.
        images: (N, C, H, W).
        style: style of the file.
        machine: processor; this one by default.

    Returns:
        The comparison; None if the file computes nothing on codes.
    """
    machine = machine or Machine.here()
    try:
        twin = Twin(path, machine or Machine())
        operators = sum(count for op, count in twin.kernels.items() if op in OPERATORS)
        if not operators:
            return None
        if machine is None:
            return TwinCheck(operators=operators, saturating=twin.saturating, skipped=OTHER_PROCESSOR)
        cuts, names = _cuts(path, frozen, images, style)
        found = twin.trace(images.numpy(), names)
        logits = found[twin.graph.output]
        answer = onnx_session(path, optimized=True)(images).numpy()
        differing = unlike(path, twin, images.numpy())
    except Exception as error:  # anything may be in a graph; a report does not keep a file from its user
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()), 200)
        return TwinCheck(skipped=f"the twin cannot compute the file: {reason}")
    return TwinCheck(
        images=len(images),
        operators=operators,
        unlike=differing,
        floating=twin.uncertain,
        max_abs_diff=float(np.abs(logits - answer).max(initial=0.0)),
        saturating=twin.saturating,
        saturates=machine.saturates,
        layers=tuple(each for cut in cuts if (each := _layer(cut, found.get(cut.after))) is not None),
    )


def _cuts(path: Path, frozen: nn.Module, images: Tensor, style: OnnxStyle) -> tuple[list[Any], list[str]]:
    """The quantizers of the file with the calls of the model, and the names of their outputs."""
    with recorded(frozen) as calls:
        frozen(images)
    cuts = cut_open(onnx.load(str(path)).graph, calls, style.quantizers)
    return cuts, [cut.after for cut in cuts]


def _layer(cut: Any, answer: Any) -> LayerCodes | None:
    """The comparison of a quantizer's codes; None if the runtime does not have them."""
    truth = np.pad(cut.call.codes, cut.pads) if cut.pads else cut.call.codes
    if answer is None or answer.shape != truth.shape:
        return None
    found = np.rint(answer / cut.unit) if cut.dtype == np.float32 else answer.astype(np.float32) - cut.zero
    apart = np.abs(found - truth)
    return LayerCodes(cut.layer, truth.size, int((apart > 0).sum()), int(apart.max(initial=0)))


def unlike(path: Path, twin: Twin, images: Any) -> tuple[str, ...]:
    """Operators on codes that differ between runtime and twin: in number, or in a bit of a result.

    Args:
        path: the file of ``twin``.
        twin: the twin.
        images: float32 (N, C, H, W).
    """
    with tempfile.TemporaryDirectory(prefix="saq-") as folder:
        optimized = _optimized(path, Path(folder), images)
    theirs = Counter(node.op for node in optimized.operators)
    ours = Counter({op: count for op, count in twin.kernels.items() if op in OPERATORS})
    counts = [
        f"{theirs[op]} {op} in ONNX Runtime, {ours[op]} in the twin"
        for op in sorted({*theirs, *ours})
        if theirs[op] != ours[op]
    ]
    known = optimized.graph.constants | optimized.tensors
    wrong = [
        node.name
        for node in optimized.operators
        if not _same_bits(
            evaluate_node(optimized.graph, node, [known.get(name) for name in node.inputs], twin.machine)[0],
            known[node.output],
        )
    ]
    return (*counts, *wrong)


def _same_bits(one: Any, other: Any) -> bool:
    return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())


def _optimized(path: Path, folder: Path, images: Any) -> _Optimized:
    """The graph that the runtime makes of a file, run on ``images``."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    )  # no processor's layouts yet
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    with translated_errors(path):
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(options.optimized_model_filepath)
    optimized = _Optimized(Graph(Path(options.optimized_model_filepath)))
    wanted = dict.fromkeys(
        name
        for node in optimized.operators
        for name in (*node.inputs, node.output)
        if name and name not in optimized.graph.constants
    )
    present = {value.name for value in (*model.graph.output, *model.graph.input)}
    for name in wanted:
        if name not in present:
            model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    plain = ort.SessionOptions()
    plain.log_severity_level = 4
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with translated_errors(path):
        session = ort.InferenceSession(model.SerializeToString(), plain, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: images}
        names = [value.name for value in session.get_outputs()]
        optimized.tensors = feed | dict(zip(names, session.run(names, feed), strict=True))
    return optimized
