"""What a minimizer is handed for one step: chunks of images, cut into what fits in memory.

step          all images that one update learns from
chunk         the images that share one perturbation (m-sharpness; all of them where nothing says otherwise)
micro-batch   the images of one forward pass; gradients of a chunk's micro-batches add up
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from saqcli.algorithms.sharpness import Gradients, PerturbedSet, add_up


class Loss(Protocol):
    """Runs the forward pass on a micro-batch."""

    def __call__(self, *, ascent: bool = False) -> Tensor:
        """Mean loss over the images; may be called more than once.

        Args:
            ascent: only a direction is sought, so that a part of the images, or a lower precision, may do.
        """


class MicroBatch(NamedTuple):
    """Images of one forward pass.

    Attributes:
        loss: their mean loss.
        share: of the step's images; the shares of a step sum to 1.
    """

    loss: Loss
    share: float


Chunk = Sequence[MicroBatch]


def accumulate(micro_batches: Iterable[MicroBatch]) -> Tensor:
    """Back-propagate the micro-batches one after the other, into ``.grad``; returns their part of the step's loss."""
    losses = []
    for micro_batch in micro_batches:
        loss = micro_batch.loss() * micro_batch.share
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def gradients_of(
    chunk: Chunk,
    members: PerturbedSet,
    *,
    ascent: bool = False,
    through_rounding: bool = False,
    also: Sequence[nn.Parameter] = (),
) -> tuple[Tensor, Gradients]:
    """Mean loss of the chunk, and its gradients as from ``members.gradients``: none accumulates anywhere."""
    whole = sum(micro_batch.share for micro_batch in chunk)
    losses: list[Tensor] = []
    total: Gradients = []
    for micro_batch in chunk:
        loss, gradients = members.gradients(
            partial(micro_batch.loss, ascent=ascent), through_rounding=through_rounding, also=also
        )
        part = micro_batch.share / whole
        losses.append(loss * part)
        total = add_up(total, gradients, part)
    return torch.stack(losses).sum(), total
