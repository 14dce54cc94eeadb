"""One training step, with recovery from out-of-memory errors and from losses that are NaN or infinite.

out of memory      the batch is repeated in micro-batches of half the size, from the same random numbers and running
                   statistics: the step equals one that was taken in micro-batches of that size
NaN or infinity    a step whose loss or gradient is not finite is skipped; after several in a row training stops

In both cases weights, optimizer and running statistics are as before the step. All ranks do the same.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.errors import DeviceMemoryError, TrainingDiverged, out_of_memory
from saqcli.random_state import random_state, set_random_state
from saqcli.training.execution import Engine, Execution, Trial
from saqcli.training.memory import retry_on_oom
from saqcli.training.minimizers import Minimizer
from saqcli.training.minimizers.base import Passes
from saqcli.training.objective import Objective, Piece, as_chunks
from saqcli.units import counted

PATIENCE = 10  # skipped steps in a row before training stops
SMALLEST = 2  # images of a micro-batch: a batch norm cannot use a single one


@dataclass
class Recovery:
    """Recovery from steps that fail; ``vars`` of it go into a checkpoint.

    Attributes:
        micro_batch: most images in one forward pass; None for no limit.
        skipped: steps skipped in this epoch.
        in_row: steps skipped since the last good one.
        patience: most steps skipped in a row.
    """

    micro_batch: int | None = None
    skipped: int = 0
    in_row: int = 0
    patience: int = PATIENCE

    def skip_step(self, error: TrainingDiverged, note: Callable[[str], None]) -> None:
        """Count a step that is skipped because of ``error``.

        Raises:
            TrainingDiverged: more than ``patience`` steps in a row were skipped.
        """
        self.skipped += 1
        self.in_row += 1
        if self.in_row > self.patience:
            message = f"{counted(self.in_row, 'step')} in a row were skipped: {error}"
            raise distributed.reported_once(TrainingDiverged(message)) from None
        if self.in_row == 1:
            note(f"step skipped: {error}")

    def shrink_micro_batch(self, images: int, note: Callable[[str], None]) -> None:
        """Halve the micro-batch, or ``images`` where these are fewer.

        Raises:
            DeviceMemoryError: the micro-batch is the smallest possible.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        now = min(images, self.micro_batch or images)
        if now <= SMALLEST:
            tried = f"out of memory with {counted(now, 'image')} at a time"
            message = f"{tried}: use a smaller `model.input_size` or network"
            raise distributed.reported_once(DeviceMemoryError(message))
        self.micro_batch = max(SMALLEST, -(-now // 2))
        note(
            f"out of memory: continuing with micro-batches of {self.micro_batch} images, whose gradients add up "
            "(batch norms see that many at a time)"
        )


class Stepper:
    """Takes the training steps of a model.

    Attributes:
        device: of the model.
        loss: of the last step, at the unperturbed weights.
        engine: calls the model.
        execution: how passes are computed; None before the first step.
        choose: decides on it from the images and labels of the first step; None to compute as written.

    Args:
        model: wrapped, quantizers installed, in training mode.
        minimizer: updates the weights.
        objective: the loss.
        sharpness_batch: most images that share one perturbation.
        recovery: state so far; kept up to date.
        note: receives a line for every kind of failure.
    """

    def __init__(
        self,
        model: nn.Module,
        minimizer: Minimizer,
        objective: Objective,
        sharpness_batch: int,
        recovery: Recovery,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.minimizer, self.objective = model, minimizer, objective
        self.sharpness_batch, self.recovery, self.note = sharpness_batch, recovery, note
        self.device = next(model.parameters()).device
        self.loss = math.nan
        self.engine = Engine(model, note)
        self._autocast = objective.autocast
        self._teacher: Engine | None = None
        if objective.distillation is not None:
            self._teacher = Engine(objective.distillation.teacher, note)
            distillation = replace(objective.distillation, teacher=self._teacher)
            self.objective = replace(objective, distillation=distillation)
        self.execution: Execution | None = None
        self.choose: Callable[[Tensor, Tensor], Execution] | None = None

    def compute(self, execution: Execution) -> None:
        """Compute in this way from now on, as far as the machine allows it."""
        self.engine.set(execution)
        self.execution = self.engine.execution
        if self._teacher is not None:
            self._teacher.set(execution)
        half = partial(torch.autocast, self.device.type, dtype=torch.bfloat16)
        autocast = half if execution.precision == "bfloat16" else self._autocast
        self.objective = replace(self.objective, autocast=autocast)

    def restore(self) -> None:
        """Lay out weights as they were."""
        self.engine.restore()
        if self._teacher is not None:
            self._teacher.restore()

    def trial(self, images: Tensor, labels: Tensor) -> Trial:
        """Passes of a step on these images that leave everything as it was."""

        def run(execution: Execution) -> Execution:
            snapshot = Snapshot(self.model)
            self.compute(execution)
            try:
                self._passes(images, labels)
            finally:
                snapshot.restore()
                self.model.zero_grad()
            return self.engine.execution

        return run

    def sizes(self, images: Tensor, labels: Tensor) -> tuple[int, ...]:
        """Images of the forward passes of a step on these images."""
        before = random_state()
        pieces = self.objective.pieces(
            self.engine, images, labels, self.sharpness_batch, self.recovery.micro_batch
        )
        set_random_state(before)
        return tuple(sorted({size for chunk in pieces for piece in chunk for size in piece.sizes()}))

    def __call__(self, images: Tensor, labels: Tensor) -> list[Piece]:
        """One step on images (N, C, H, W) and labels (N,); its pieces, or none if it was skipped.

        Raises:
            TrainingDiverged: too many steps in a row were skipped.
            DeviceMemoryError: not even the smallest micro-batch fits.
        """
        if self.execution is None:
            self.compute(Execution() if self.choose is None else self.choose(images, labels))
        snapshot = Snapshot(self.model)

        def shrink_micro_batch() -> None:
            snapshot.restore()
            self.recovery.shrink_micro_batch(min(len(labels), self.sharpness_batch), self.note)
            if self.engine.execution.compiled:
                self.compute(replace(self.engine.execution, sizes=self.sizes(images, labels)))

        pieces, passes = retry_on_oom(lambda: self._passes(images, labels), shrink_micro_batch)
        self.execution = self.engine.execution  # a network that cannot be compiled is computed as written
        try:
            self.loss = float(self.minimizer.update(passes))
        except TrainingDiverged as error:
            snapshot.restore(random=False)
            self.recovery.skip_step(error, self.note)
            return []
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise DeviceMemoryError(  # the weights may be updated in part: no retry
                "out of memory for the optimizer's state: use a smaller `training.micro_batch` or "
                "`data.batch_size`, or `training.optimizer=sgd`"
            ) from None
        self.recovery.in_row = 0
        return [piece for chunk in pieces for piece in chunk]

    def _passes(self, images: Tensor, labels: Tensor) -> tuple[list[list[Piece]], Passes]:
        """All forward and backward passes of a step."""
        pieces = self.objective.pieces(
            self.engine, images, labels, self.sharpness_batch, self.recovery.micro_batch
        )
        return pieces, self.minimizer.gradients(as_chunks(pieces))


class Snapshot:
    """Buffers and random numbers before a step."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        self._random = random_state()

    @torch.no_grad()
    def restore(self, *, random: bool = True) -> None:
        """Restore the buffers, and with ``random`` the random numbers, so that the step can be repeated."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
        if random:
            set_random_state(self._random)
