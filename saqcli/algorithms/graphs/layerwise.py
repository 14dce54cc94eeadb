"""Proof by parts: every layer of an ONNX graph, fed what PyTorch feeds it, hands on the codes that PyTorch hands on.

End to end the two cannot agree to the last bit: they sum in different orders, an activation on the edge
between two codes then falls to the other side, and in a deep network one such step becomes thousands further
on. So the graph is cut open behind every activation quantizer. There it gets PyTorch's codes, and the codes
that it would have used itself are compared with them. Between two cuts lies nothing but summation order: a
code may differ by one step, and only where PyTorch's own number lies on the edge between the two to within
rounding error: 1e-4 of the largest magnitude, or more where PyTorch itself is further from float64 (a norm that
takes a large mean away leaves little but rounding errors).

Cut there, each part is quantized on both sides, as in the whole graph, so what a runtime's optimizer does to it shows.
"""

from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from saqcli.algorithms.graphs.cuts import (
    AS_PYTORCH,
    LARGEST_ERROR,
    LARGEST_OWN_ERROR,
    Cut,
    Unmatched,
    cut_open,
    own_errors,
    recorded,
    relative,
    run,
)

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
