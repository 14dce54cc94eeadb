"""Does a file compute what the model computes? Run both on the same images and compare.

A safetensors file must give the same logits, bit for bit, and so must an ONNX graph of style ``exact``,
compared with the exact form of the model. The other styles cannot: two runtimes sum in different orders,
where an activation lies on the edge between two codes the last bit of such a sum decides, and the difference
becomes a whole step, which a deep network multiplies. So they are proved layer by layer
(``graphs.layerwise``); end to end both runtimes are compared with the model in float64, and it is only asked
that little is left of that: nearly every image has the same best class, and the logits differ by little on average.
Where PyTorch itself, in float32, is far from its own float64 (networks that amplify every rounding), twice as
far is allowed.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from saqcli.algorithms.training import Batches
from saqcli.progress import Progress
from saqcli.workflows.verdict import Verdict

TIE = 2.0**-20  # of the largest logit: where two best classes are nearer, rounding decides


def compare(
    reference: Callable[[Tensor], Tensor],
    candidates: dict[str, Callable[[Tensor], Tensor]],
    batches: Batches,
    total: int,
    progress: Progress,
) -> dict[str, Verdict]:
    """Compare every candidate with the reference on all batches; a verdict each.

    Args:
        reference: images (N, C, H, W) to logits (N, classes): the PyTorch model, in float64 where sums must
            not depend on their order.
        candidates: by name: the same file run in several ways, the model in float32.
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
    return {name: judge(torch.cat(truth), torch.cat(answer)) for name, answer in answers.items()}


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on the same file run in several ways: that of the run that failed, or else differs most."""
    return max(verdicts, key=lambda verdict: (not verdict.verified, verdict.max_abs_diff))


def judge(truth: Tensor, answer: Tensor) -> Verdict:
    """The verdict on two sets of logits, (N, classes) each."""
    if truth.shape != answer.shape or not answer.isfinite().all():
        problem = f"it answers {tuple(answer.shape)} where {tuple(truth.shape)} finite numbers are expected"
        return Verdict(len(truth), 0.0, float("inf"), float("inf"), [problem])
    difference = (truth - answer).abs()
    spread = float(truth.std()) or 1.0
    lost = truth.amax(1) - truth.gather(1, answer.argmax(1, keepdim=True)).squeeze(1)
    agreement = (lost <= TIE * truth.abs().amax(1)).double().mean()
    return Verdict(
        len(truth),
        float(agreement),
        float(difference.max()),
        float(difference.mean()) / spread,
        largest_logit=float(truth.abs().max()),
    )
