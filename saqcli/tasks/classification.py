"""Image classification: losses, distillation, mixing, accuracy.

Everything that is specific to the task is here and in the other files of this room. Another task would be a file with
the same names: what a model must return, the loss of a batch, its sum over images, the largest loss of a model that
learns, and the score of a model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from saqcli import distributed
from saqcli.config import TrainingSection
from saqcli.errors import UnsupportedModel

OUTPUT = "class scores"  # of a model, (N, classes)


def unfit(output: Any, images: int) -> str | None:
    """What a model returned for ``images`` images if these are no class scores, else None."""
    if not isinstance(output, Tensor):
        return type(output).__name__
    return None if output.dim() == 2 and len(output) == images else f"tensor of {tuple(output.shape)}"


def check_output(output: Any, images: int) -> None:
    """Check what a model returned for ``images`` images.

    Raises:
        UnsupportedModel: these are no class scores.
    """
    if kind := unfit(output, images):
        raise UnsupportedModel(f"the model returns a {kind} instead of {OUTPUT}, ({images}, classes)")


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, classes) and labels (N,) or shares (N, classes)."""
    return F.cross_entropy(logits, labels)


def total_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits (N, classes) and labels (N,) or shares (N, classes), summed over the images."""
    return F.cross_entropy(logits, labels, reduction="sum")


def largest_loss(classes: int) -> float:
    """100 times the loss of guessing, ln(classes); no network that learns is near it."""
    return 100.0 * math.log(max(classes, 2))


def criterion(training: TrainingSection) -> Callable[[Tensor, Tensor], Tensor]:
    """The training loss, from logits (N, classes) and labels (N,) or shares (N, classes) to a mean.

    Mixed images come with smoothed shares, so their labels are not smoothed again.
    """
    mixed = training.mixup or training.cutmix
    return nn.CrossEntropyLoss(label_smoothing=0.0 if mixed else training.label_smoothing)


def mixing(
    training: TrainingSection, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup and cutmix by timm: from images and labels to mixed images and shares; None without either."""
    if not (training.mixup or training.cutmix):
        return None
    from timm.data import Mixup

    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
        mixup_alpha=training.mixup,
        cutmix_alpha=training.cutmix,
        label_smoothing=training.label_smoothing,
        num_classes=num_classes,
    )
    return mix


def best_class(logits: Tensor) -> Tensor:
    """Index of the highest logit or share, (N, classes) to (N,)."""
    return logits.argmax(1)


@dataclass
class Score:
    """Accuracy and loss over a number of images.

    Attributes:
        images: how many were counted; unreadable ones (label below 0) are not.
        loss: mean cross-entropy, or mean of the loss that was trained with where the caller gave one.
        top1: percent; NaN where labels are no classes, such as shares or the targets of a regression.
        top5: percent; equals 100 with five classes or fewer; NaN with ``top1``.
        skipped: unreadable images left out.
    """

    images: int = 0
    loss: float = 0.0
    top1: float = 0.0
    top5: float = 0.0
    skipped: int = 0

    @property
    def rank(self) -> tuple[float, float]:
        """The larger, the better: by top-1, if there is one, then by loss."""
        return 0.0 if math.isnan(self.top1) else self.top1, -self.loss


class Meter:
    """Sums over batches; ``score()`` divides at the end."""

    def __init__(
        self, images: int = 0, skipped: int = 0, loss: float = 0.0, right1: float = 0, right5: float = 0
    ) -> None:
        """``vars(meter)`` gives the arguments that make an equal one; ``right1`` and ``right5`` are integers or NaN."""
        self.images, self.skipped = images, skipped
        self.loss = loss
        self.right1, self.right5 = right1, right5

    def clear(self) -> None:
        """Start again at zero."""
        self.images = self.skipped = self.right1 = self.right5 = 0
        self.loss = 0.0

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            logits: (N, classes).
            labels: classes (N,), integers; otherwise shares (N, classes) or other targets, which have no accuracy.
            loss: mean over the batch; None for cross-entropy.
        """
        ranked = labels.dim() == 1 and not labels.is_floating_point()
        readable = labels >= 0 if ranked else None
        if readable is not None and not readable.all():
            self.skipped += int((~readable).sum())
            logits, labels = logits[readable], labels[readable]
        if not len(labels):
            return
        logits = logits.float()
        self.images += len(labels)
        self.loss += float(total_loss(logits, labels)) if loss is None else float(loss) * len(labels)
        if not ranked:
            self.right1 = self.right5 = math.nan
            return
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        self.right1 += int(best[:, 0].sum())
        self.right5 += int(best.sum())

    def add(self, other: "Meter") -> None:
        """Count what ``other`` has counted."""
        self.images += other.images
        self.skipped += other.skipped
        self.loss += other.loss
        self.right1 += other.right1
        self.right5 += other.right5

    def over_ranks(self) -> "Meter":
        """What all ranks have counted."""
        images, skipped, loss, right1, right5 = distributed.totals(*vars(self).values())
        if not math.isnan(right1):
            right1, right5 = int(right1), int(right5)
        return Meter(int(images), int(skipped), loss, right1, right5)

    def score(self) -> Score:
        """Means over everything counted so far."""
        count = max(self.images, 1)
        return Score(
            self.images, self.loss / count, 100 * self.right1 / count, 100 * self.right5 / count, self.skipped
        )


@dataclass(frozen=True)
class Distillation:
    """Learning from the outputs of another model.

    Attributes:
        teacher: images (N, C, H, W) to logits (N, classes); a model in eval mode.
        weight: share of its outputs in the loss, 0 to 1.
        temperature: softens both outputs.
    """

    teacher: Callable[[Tensor], Tensor]
    weight: float = 0.5
    temperature: float = 1.0

    def answers(self, images: Tensor) -> Tensor:
        """The teacher's logits for ``images``, (N, classes).

        Raises:
            UnsupportedModel: it returns something else.
        """
        found = self.teacher(images)
        if kind := unfit(found, len(images)):
            raise UnsupportedModel(
                f"the teacher returns a {kind} instead of {OUTPUT}, ({len(images)}, classes)"
            )
        return found

    def distance(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean Kullback-Leibler divergence from the teacher's logits ``targets``, (N, classes) both, times T**2.

        Raises:
            UnsupportedModel: the teacher has other classes.
        """
        if logits.shape != targets.shape:
            raise UnsupportedModel(
                f"the teacher returns {targets.shape[1]} class scores and the model {logits.shape[1]}: give a "
                "teacher of the same classes"
            )
        student, teacher = (F.log_softmax(x.float() / self.temperature, dim=1) for x in (logits, targets))
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * self.temperature**2


def noise(one: Score, other: Score) -> float:
    """Standard error of the difference of two top-1s, in percentage points.

    Computed as if the two were measured on different images. They share their images, so the true error is smaller:
    a difference above this value is not chance.
    """
    return math.sqrt(sum(s.top1 * (100 - s.top1) / max(s.images, 1) for s in (one, other)))
