"""What training minimizes on a batch, and how the batch is cut for a minimizer.

    mix         the batch is blended with itself (mixup, cutmix), once: both passes see the same images
    teach       the float model answers the same images, once
    cut         chunks that share a perturbation, micro-batches that fit in memory
    loss        criterion of logits and targets, blended with the distance to the teacher's answers

Distillation is that of Hinton et al., arXiv:1503.02531: (1 - w) CE + w T**2 KL(teacher || student), both softened
by the temperature T.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.tasks import classification
from saqcli.tasks.classification import Distillation
from saqcli.training.minimizers import Chunk, MicroBatch

Precision = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Objective:
    """The loss of a batch.

    Attributes:
        criterion: logits (N, classes) and targets, labels (N,) or shares (N, classes), to a mean loss.
        mix: blends images and labels into images and shares.
        distillation: None to learn from the targets alone.
        autocast: mixed precision around the forward pass; quantizers stay in float32.
        ascent_autocast: mixed precision of the first pass; None for that of ``autocast``.
        ascent_fraction: of the images that take part in that pass.
        reported: report the criterion as the loss of an epoch, in the place of cross-entropy.
    """

    criterion: Callable[[Tensor, Tensor], Tensor]
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    distillation: Distillation | None = None
    autocast: Precision = nullcontext
    ascent_autocast: Precision | None = None
    ascent_fraction: float = 1.0
    reported: bool = False

    def pieces(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        chunk: int,
        micro_batch: int | None = None,
    ) -> list[list["Piece"]]:
        """A batch cut into chunks of at most ``chunk`` images, and these into micro-batches.

        Args:
            model: whose loss it is.
            images: (N, C, H, W).
            labels: (N,).
            chunk: most images that share a perturbation.
            micro_batch: most images in one forward pass; None for all of a chunk.
        """
        targets = labels
        if self.mix is not None:
            even = len(labels) - len(labels) % 2  # images are mixed in pairs
            images, targets = self.mix(images[:even], labels[:even])
            labels = classification.best_class(targets)
        tensors = [images, labels, targets]
        if self.distillation is not None:
            with torch.no_grad(), self.autocast():
                parts = torch.split(images, micro_batch or chunk)
                tensors.append(torch.cat([self.distillation.answers(part) for part in parts]))
        return [
            [Piece(model, self, *part) for part in cut(tensors_of_chunk, micro_batch or chunk)]
            for tensors_of_chunk in cut(tensors, chunk)
        ]


def as_chunks(pieces: list[list["Piece"]]) -> list[Chunk]:
    """What a minimizer is handed: every piece with its share of all images."""
    total = sum(len(piece.labels) for chunk in pieces for piece in chunk)
    return [[MicroBatch(piece, len(piece.labels) / total) for piece in chunk] for chunk in pieces]


def micro_batches(model: nn.Module, images: Tensor, labels: Tensor, most: int | None) -> Chunk:
    """The mean cross-entropy of a batch, images (N, C, H, W) and labels (N,), of at most ``most`` images at a time."""
    pieces = Objective(classification.loss).pieces(model, images, labels, len(labels), most)
    return as_chunks(pieces)[0]


class Piece:
    """The loss of one micro-batch, as a function that keeps the logits of its first call.

    Attributes:
        reported: mean criterion of that call, if it is to be reported.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        objective: Objective,
        images: Tensor,
        labels: Tensor,
        targets: Tensor,
        answers: Tensor | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.images, self.labels, self.targets, self.answers = images, labels, targets, answers
        self._logits: Tensor | None = None
        self.reported: Tensor | None = None

    def __call__(self, *, ascent: bool = False) -> Tensor:
        """Mean loss of the images, or in the ascent of the part of them that takes part in it."""
        wanted = self.objective
        count, precision = len(self.labels), wanted.autocast
        if ascent:
            count = self._ascending()
            precision = wanted.ascent_autocast or precision
        with precision():
            logits = self.model(self.images[:count])
        logits = logits.float()
        loss = wanted.criterion(logits, self.targets[:count])
        if self._logits is None:
            self._logits = logits.detach()
            self.reported = loss.detach() if wanted.reported else None
        if wanted.distillation is None or self.answers is None:
            return loss
        distance = wanted.distillation.distance(logits, self.answers[:count])
        return torch.lerp(loss, distance, wanted.distillation.weight)

    def _ascending(self) -> int:
        count = len(self.labels)
        return min(count, max(2, round(self.objective.ascent_fraction * count)))  # a batch norm needs two

    def sizes(self) -> set[int]:
        """Images of its forward passes."""
        return {len(self.labels), self._ascending()}

    def counted(self) -> tuple[Tensor, Tensor]:
        """Logits of the first call, at the unperturbed weights, and their labels.

        Raises:
            RuntimeError: the minimizer never asked for the loss.
        """
        if self._logits is None:
            raise RuntimeError("the minimizer never asked for the loss of these images")
        return self._logits, self.labels[: len(self._logits)]


def cut(tensors: list[Tensor], size: int) -> list[list[Tensor]]:
    """Parts of at most ``size`` images, as equal as they can be: a batch norm cannot use a single image."""
    count = -(-len(tensors[0]) // size)
    return [list(part) for part in zip(*(tensor.tensor_split(count) for tensor in tensors), strict=True)]


def sizes(images: int, size: int) -> list[int]:
    """How many images the parts have that ``cut`` makes of ``images``.

    Example:
        >>> sizes(7, 3)
        [3, 2, 2]
    """
    count = -(-images // size)
    return [images // count + (part < images % count) for part in range(count)]
