"""Training steps, and passes over images for other ends, that outlive what can go wrong in them.

out of memory    the batch is passed over again in micro-batches of half the size, from the same random numbers and
                 running statistics on: it is the step that the smaller size would have made from the start
no number        a loss or gradient that is not finite: the step is left out, and after several in a row training ends

In both cases nothing is left behind: weights, optimizer and running statistics are as before the step. All ranks do
the same.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.errors import DeviceMemoryError, TrainingDiverged, out_of_memory
from saqcli.random_state import random_state, set_random_state
from saqcli.training.minimizers import Minimizer
from saqcli.training.minimizers.base import Passes
from saqcli.training.objective import Objective, Piece, as_chunks
from saqcli.units import counted

T = TypeVar("T")
PATIENCE = 10  # steps in a row that are left out before training ends
SMALLEST = 2  # images of a micro-batch: a batch norm cannot use a single one


@dataclass
class Setbacks:
    """What went wrong so far, as far as it matters for the steps to come; ``vars`` of it go into a checkpoint.

    Attributes:
        micro_batch: most images in one forward pass; None for no limit.
        skipped: steps left out in this epoch.
        in_row: steps left out since the last good one.
        patience: of those, before training ends.
    """

    micro_batch: int | None = None
    skipped: int = 0
    in_row: int = 0
    patience: int = PATIENCE

    def leave_out(self, error: TrainingDiverged, note: Callable[[str], None]) -> None:
        """Count a step that cannot be taken, for ``error``.

        Raises:
            TrainingDiverged: it is one too many.
        """
        self.skipped += 1
        self.in_row += 1
        if self.in_row > self.patience:
            message = f"{counted(self.in_row, 'step')} in a row could not be taken: {error}"
            raise distributed.reported_once(TrainingDiverged(message)) from None
        if self.in_row == 1:
            note(f"a step is left out: {error}")

    def halve(self, images: int, note: Callable[[str], None]) -> None:
        """Pass over half as many images at a time from now on, where ``images`` did not fit.

        Raises:
            DeviceMemoryError: they are too few to be halved.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        now = min(images, self.micro_batch or images)
        if now <= SMALLEST:
            message = f"out of memory with {counted(now, 'image')} at a time: give a smaller --input-size or network"
            raise distributed.reported_once(DeviceMemoryError(message))
        self.micro_batch = max(SMALLEST, -(-now // 2))
        note(
            f"out of memory: going on with micro-batches of {self.micro_batch} images, whose gradients add up "
            "(batch norms see that many at a time)"
        )


class Stepper:
    """Takes the steps of a model.

    Attributes:
        loss: of the last step, at the unperturbed weights.

    Args:
        model: wrapped, quantizers installed, in training mode.
        minimizer: moves the weights.
        objective: what is minimized.
        sharpness_batch: most images that share one perturbation.
        setbacks: so far; kept up to date.
        note: told what went wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        minimizer: Minimizer,
        objective: Objective,
        sharpness_batch: int,
        setbacks: Setbacks,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.minimizer, self.objective = model, minimizer, objective
        self.sharpness_batch, self.setbacks, self.note = sharpness_batch, setbacks, note
        self.loss = math.nan

    def __call__(self, images: Tensor, labels: Tensor) -> list[Piece]:
        """One step on images (N, C, H, W) and labels (N,); its pieces, or none if it was left out.

        Raises:
            TrainingDiverged: too many in a row were left out.
            DeviceMemoryError: not even the smallest micro-batch fits.
        """
        before = Before(self.model)

        def need_less() -> None:
            before.restore()
            self.setbacks.halve(min(len(labels), self.sharpness_batch), self.note)

        pieces, passes = fitting(lambda: self._pass(images, labels), need_less)
        try:
            self.loss = float(self.minimizer.update(passes))
        except TrainingDiverged as error:
            before.restore(random=False)
            self.setbacks.leave_out(error, self.note)
            return []
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise DeviceMemoryError(  # weights may have moved in part: not to be tried again
                "out of memory for the optimizer's own numbers, beside the images: give a smaller --micro-batch or "
                "--batch-size, or --optimizer sgd"
            ) from None
        self.setbacks.in_row = 0
        return [piece for chunk in pieces for piece in chunk]

    def _pass(self, images: Tensor, labels: Tensor) -> tuple[list[list[Piece]], Passes]:
        """All passes over the batch."""
        pieces = self.objective.pieces(
            self.model, images, labels, self.sharpness_batch, self.setbacks.micro_batch
        )
        return pieces, self.minimizer.gradients(as_chunks(pieces))


class Before:
    """What a step that fails half-way has changed already."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._random = random_state()

    @torch.no_grad()
    def restore(self, *, random: bool = True) -> None:
        """Put it back; the random numbers only where the step is to be tried again."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
        if random:
            set_random_state(self._random)


def fitting(attempt: Callable[[], T], need_less: Callable[[], None]) -> T:
    """What ``attempt`` returns once it fits in the memory of all ranks.

    Args:
        attempt: passes over images.
        need_less: called after every attempt that did not fit, when its tensors are gone; puts back what it has changed
            and lets the next one need less.
    """
    while True:
        done = if_it_fits(attempt)
        if not distributed.any_of(done is None):
            assert done is not None
            return done[0]
        done = None
        need_less()


def if_it_fits(attempt: Callable[[], T]) -> tuple[T] | None:
    """What ``attempt`` returns, or None where memory ran out; its tensors are gone then."""
    try:
        return (attempt(),)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return None
