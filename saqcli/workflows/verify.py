"""Does a file compute what the model computes? Run both on the same images and compare.

A safetensors file must give the same logits, bit for bit. An ONNX graph with Q/DQ nodes cannot: the two runtimes sum
in different orders, where an activation lies on the edge between two codes the last bit of such a sum decides, and the
difference becomes a whole step, which a deep network multiplies. So the graph is proved layer by layer
(``onnx_layerwise``); end to end both runtimes are compared with the model in float64, and it is only asked
that little is left of that: nearly every image has the same best class, and the logits differ by little on average.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saqcli.algorithms.training import Batches
from saqcli.progress import Progress

LEAST_AGREEMENT = 0.95  # share of images with the same best class
PYTORCH = "pytorch"
LARGEST_MEAN_DIFFERENCE = 0.2  # of logits, in units of their standard deviation


@dataclass
class Verdict:
    """How two predictors compare.

    Attributes:
        images: compared.
        argmax_agreement: share of images with the same best class, 0 to 1.
        max_abs_diff: largest difference of a logit.
        mean_abs_diff: mean difference of a logit, in units of the logits' standard deviation.
        layers: parts of the graph that were compared one by one; 0 where the file is no graph.
        pytorch_agreement: share of images on which PyTorch itself, in float32, has the best class of the reference.
        layers_error: largest difference of any of them, relative to the largest magnitude of its tensor.
        problems: what is wrong with the file itself, a line each.
    """

    images: int
    argmax_agreement: float
    max_abs_diff: float
    mean_abs_diff: float
    problems: list[str] = field(default_factory=list)
    layers: int = 0
    layers_error: float = 0.0
    pytorch_agreement: float = 1.0

    @property
    def verified(self) -> bool:
        """Whether the file may be used in place of the model."""
        return (
            not self.problems
            and self.argmax_agreement >= LEAST_AGREEMENT
            and self.mean_abs_diff <= LARGEST_MEAN_DIFFERENCE
        )


def compare(
    reference: Callable[[Tensor], Tensor],
    candidates: dict[str, Callable[[Tensor], Tensor]],
    batches: Batches,
    total: int,
    progress: Progress,
) -> Verdict:
    """Compare every candidate with the reference on all batches; the verdict is of the worst.

    Args:
        reference: images (N, C, H, W) to logits (N, classes): the PyTorch model, in float64 where sums must
            not depend on their order.
        candidates: the same file run in several ways, by name; under ``PYTORCH`` the model in float32, which
            is measured and not judged.
        batches: images on the device of the reference; labels are not used.
        total: number of batches.
        progress: told about every batch.
    """
    truth: list[Tensor] = []
    answers: dict[str, list[Tensor]] = {name: [] for name in candidates}
    with progress.task("verifying", total) as task, torch.inference_mode():
        for images, labels in batches:
            images = images[
                labels.to(images.device) >= 0
            ]  # what stands in for an unreadable image proves nothing
            if not len(images):
                continue
            truth.append(reference(images).float().cpu())
            for name, predict in candidates.items():
                answers[name].append(predict(images).float().cpu())
            task.advance(images=len(images))
    verdicts = {name: judge(torch.cat(truth), torch.cat(answer)) for name, answer in answers.items()}
    pytorch = verdicts.pop(PYTORCH, None)
    worst = max(verdicts.values(), key=lambda verdict: (not verdict.verified, verdict.max_abs_diff))
    worst.pytorch_agreement = pytorch.argmax_agreement if pytorch else 1.0
    return worst


def judge(truth: Tensor, answer: Tensor) -> Verdict:
    """The verdict on two sets of logits, (N, classes) each."""
    if truth.shape != answer.shape or not answer.isfinite().all():
        problem = f"it answers {tuple(answer.shape)} where {tuple(truth.shape)} finite numbers are expected"
        return Verdict(len(truth), 0.0, float("inf"), float("inf"), [problem])
    difference = (truth - answer).abs()
    spread = float(truth.std()) or 1.0
    agreement = (truth.argmax(1) == answer.argmax(1)).double().mean()
    return Verdict(len(truth), float(agreement), float(difference.max()), float(difference.mean()) / spread)
