"""The only loops over batches: one epoch of training, one pass of evaluation."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saqcli.algorithms.minimizers import Minimizer
from saqcli.algorithms.objective import Objective, as_chunks
from saqcli.errors import DataError, TrainingDiverged
from saqcli.progress import Task

Batches = Iterable[tuple[Tensor, Tensor]]  # images (N, C, H, W) and labels (N,)


@dataclass
class Score:
    """Accuracy and loss over a number of images.

    Attributes:
        images: how many were counted; unreadable ones (label below 0) are not.
        loss: mean cross-entropy.
        top1: percent.
        top5: percent; equals 100 with five classes or fewer.
        skipped: unreadable images left out.
    """

    images: int = 0
    loss: float = 0.0
    top1: float = 0.0
    top5: float = 0.0
    skipped: int = 0


class Meter:
    """Sums over batches; ``score()`` divides at the end."""

    def __init__(
        self, images: int = 0, skipped: int = 0, loss: float = 0.0, right1: int = 0, right5: int = 0
    ) -> None:
        """``vars(meter)`` gives the arguments that make an equal one."""
        self.images, self.skipped = images, skipped
        self.loss = loss
        self.right1, self.right5 = right1, right5

    def clear(self) -> None:
        """Start again at zero."""
        self.images = self.skipped = self.right1 = self.right5 = 0
        self.loss = 0.0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits (N, classes), labels (N,)."""
        readable = labels >= 0
        if not readable.all():
            self.skipped += int((~readable).sum())
            logits, labels = logits[readable], labels[readable]
        if not len(labels):
            return
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self.images += len(labels)
        self.loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        self.right1 += int(best[:, 0].sum())
        self.right5 += int(best.sum())

    def score(self) -> Score:
        """Means over everything counted so far."""
        count = max(self.images, 1)
        return Score(
            self.images, self.loss / count, 100 * self.right1 / count, 100 * self.right5 / count, self.skipped
        )


def evaluate(
    predict: Callable[[Tensor], Tensor],
    batches: Batches,
    task: Task,
    *,
    device: torch.device,
    keep: list[Tensor] | None = None,
) -> Score:
    """Accuracy and loss of ``predict``.

    Args:
        predict: images (N, C, H, W) to logits (N, classes); a model in eval mode, or an ONNX session.
        batches: deterministic.
        task: told about every batch.
        device: of the images that ``predict`` gets.
        keep: filled with the best class of every counted image, in order.

    Raises:
        DataError: not one readable image.
    """
    meter = Meter()
    with torch.inference_mode():
        for images, labels in batches:
            logits = predict(images.to(device, non_blocking=True)).cpu()
            labels = labels.cpu()
            meter.update(logits, labels)
            if keep is not None:
                keep.append(logits[labels >= 0].argmax(1))
            task.advance(images=len(labels), top1=100 * meter.right1 / max(meter.images, 1))
    if not meter.images:
        raise DataError("not one image could be read: there is nothing to evaluate")
    return meter.score()


@dataclass
class EpochSettings:
    """What one epoch of training needs beside model, minimizer and batches.

    Attributes:
        objective: what is minimized.
        device: of the model.
        sharpness_batch: images that share one perturbation (m-sharpness); the batch is split into such
            chunks.
        after_step: called with the number of steps done in this epoch; it steps the schedule, saves, or
            stops.
        after_skip: called once batches done before an interruption are passed over; puts the random state
            back.
        micro_batch: most images in one forward pass; gradients accumulate over those of a chunk. None for no limit.
    """

    objective: Objective
    device: torch.device
    sharpness_batch: int
    after_step: Callable[[int], None]
    after_skip: Callable[[], None] = lambda: None
    micro_batch: int | None = None


def train_epoch(
    model: nn.Module,
    minimizer: Minimizer,
    batches: Batches,
    task: Task,
    settings: EpochSettings,
    meter: Meter,
    skip: int = 0,
) -> Score:
    """One pass over ``batches``; loss and accuracy are those of the unperturbed model in training mode.

    Args:
        model: wrapped, quantizers installed.
        minimizer: moves the weights.
        batches: training images and labels.
        task: told about every step.
        settings: the rest.
        meter: counts on.
        skip: batches to pass over without a step: those done before an interruption.

    Raises:
        TrainingDiverged: the loss is no finite number.
    """
    model.train()
    for index, (images, labels) in enumerate(batches):
        if index < skip:
            if index == skip - 1:
                settings.after_skip()
            continue
        images = images.to(settings.device, non_blocking=True)
        labels = labels.to(settings.device, non_blocking=True)
        pieces = settings.objective.pieces(
            model, images, labels, settings.sharpness_batch, settings.micro_batch
        )
        try:
            minimizer.step(as_chunks(pieces))
        except TrainingDiverged as error:
            raise TrainingDiverged(f"step {index + 1} of this epoch: {error}") from None
        for piece in itertools.chain(*pieces):
            meter.update(*piece.counted())
        so_far = meter.score()
        task.advance(images=len(labels), loss=so_far.loss, top1=so_far.top1)
        settings.after_step(index + 1)
    return meter.score()
