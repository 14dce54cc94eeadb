"""Training over epochs that can be interrupted at any step and resumed bit-identically.

The images of an epoch depend on (seed, epoch) alone. A checkpoint within an epoch holds the number of steps done and
the random states; resuming draws the same images again, passes over those done, and continues.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakMethod

from torch import Tensor, nn

from saqcli import distributed
from saqcli.config import TrainingSection
from saqcli.errors import RunDirectoryError
from saqcli.progress import SILENT, Progress, Task
from saqcli.random_state import random_state, set_random_state
from saqcli.runs.checkpoints import CheckpointFile
from saqcli.tasks.classification import Meter, Score, largest_loss
from saqcli.training.best import Best
from saqcli.training.dampening import Dampening
from saqcli.training.execution import Execution, choose
from saqcli.training.loop import evaluate, train_epoch
from saqcli.training.minimizers.base import check_epoch
from saqcli.training.optimizer import (
    check_perturbed,
    chosen_radius,
    make_minimizer,
    make_objective,
    make_optimizer,
    make_schedule,
)
from saqcli.training.step import Recovery, Stepper
from saqcli.units import counted, format_duration, format_figure


class SizedBatches(Protocol):
    """Batches of images (N, C, H, W) and labels (N,), any number of times; a loader, or a list."""

    def __len__(self) -> int:
        """Batches in one pass."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass."""


class TrainingRun(Protocol):
    """Where a trainer saves its state and reports its metrics; a signal may ask it to stop."""

    def offer(
        self, state: Callable[[], dict[str, Any]], *, milestone: bool = False, failing: bool = False
    ) -> None:
        """Save ``state()`` if it is due; as ``Memory.offer``. All ranks call this together.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
        """

    def log(self, **values: Any) -> None:
        """Record the metrics of an epoch."""

    def check_signal(self) -> None:
        """Stop this rank, without the others and without saving, if a signal asked to.

        Raises:
            Interrupted: a signal asked to stop.
        """


class _NoRun:
    """Saves nothing, records nothing."""

    def offer(
        self, state: Callable[[], dict[str, Any]], *, milestone: bool = False, failing: bool = False
    ) -> None:
        """Nothing is saved."""

    def log(self, **values: Any) -> None:
        """Nothing is recorded."""

    def check_signal(self) -> None:
        """Signals are raised as usual."""


NO_RUN: TrainingRun = _NoRun()


class InterruptibleTask:
    """A task that stops between two batches if a signal asks to."""

    def __init__(self, task: Task, run: TrainingRun) -> None:
        self._task, self._run = task, run

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        """Report to the task.

        Raises:
            Interrupted: a signal asked to stop.
        """
        self._run.check_signal()
        self._task.advance(steps, images=images, **figures)


class _Clock:
    """Says once, from steps of one epoch, how long the remaining ones will take, if that is a minute or more."""

    warm, timed = 5, 15  # steps: the first ones compile and choose kernels

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note, self._steps, self._since = note, 0, 0.0

    def tick(self, step: int, left: int) -> None:
        """Step ``step`` of an epoch ends, with ``left`` more to come in all."""
        if step == 1 and self._steps < self.warm + self.timed:
            self._steps = 0  # between epochs there are evaluations
        self._steps += 1
        if self._steps == self.warm:
            self._since = time.perf_counter()
        elif self._steps == self.warm + self.timed:
            each = (time.perf_counter() - self._since) / self.timed
            if each * left >= 60:
                self._note(
                    f"steps of training take about {format_duration(each * left)} more, {each:.2g} s each"
                )


class Trainer:
    """Trains a model: one optimizer, one schedule, one minimizer, over all epochs.

    Args:
        model: on its device; wrapped and with quantizers installed, or in floating point (``in_float``).
        batches: training images and labels; ``set_epoch`` of them seeds every epoch.
        training: the settings.
        num_classes: logits of the model.
        image_size: larger side of the images, in pixels; decides on the default radius of the ascent.
        network: canonical name, which decides on that radius too if it has a published one.
        validation: batches to evaluate on after every epoch; None for no evaluation.
        initial: score of the model before training, the first candidate for the best state.
        teacher: float model in eval mode, for distillation.
        criterion: logits (N, classes) and targets to a mean loss, which is reported as well; None for that of the
            settings.
        run: where state and metrics are kept.
        title: of an epoch, in front of its number.
        progress: reports every step.

    Attributes:
        epoch: epochs done.
        step: steps done in the epoch after these.
        best: best state by validation; None without validation, and after a checkpoint that does not hold one.
        radius: of the ascent, and its source; None for a method without one.
        last: validation score after the last epoch; None before the first.

    Raises:
        ConfigError: optimizer, schedule or minimizer do not take these settings.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from saqcli.training.optimizer import in_float
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> batches = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 0, 1]))] * 3
        >>> settings = in_float(TrainingSection(epochs=2, lr=0.1), batch_size=4)
        >>> trainer = Trainer(model, batches, settings, num_classes=2, image_size=2, validation=batches)
        >>> trainer.fit()
        >>> trainer.epoch, trainer.last.images
        (2, 12)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: SizedBatches,
        training: TrainingSection,
        *,
        num_classes: int,
        image_size: int,
        network: str = "",
        validation: SizedBatches | None = None,
        initial: Score | None = None,
        teacher: nn.Module | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        run: TrainingRun = NO_RUN,
        title: str = "epoch",
        progress: Progress = SILENT,
    ) -> None:
        self.model, self.batches, self.training = model, batches, training
        self.num_classes, self.validation, self.run = num_classes, validation, run
        self.title, self.progress = title, progress
        device = next(model.parameters()).device
        self.optimizer = make_optimizer(model, training)
        self.schedule = make_schedule(self.optimizer, training, len(batches))
        self._total = len(batches) * training.epochs
        radius = chosen_radius(model, training, image_size, network)
        self.minimizer = make_minimizer(model, self.optimizer, training, radius, self._total)
        self.radius = radius if hasattr(self.minimizer, "rho") else None
        check_perturbed(model, training)
        self.dampening = Dampening(model, self.optimizer, training.dampening) if training.dampening else None
        self.average = Average(model, training.ema_decay) if training.ema_decay else None
        self.recovery = Recovery(training.micro_batch, patience=training.skip_steps)
        objective = make_objective(training, device, num_classes, teacher)
        self._criterion = criterion
        if criterion is not None:
            objective = replace(objective, criterion=criterion, reported=True)
        self._stepper = Stepper(
            model, self.minimizer, objective, training.sharpness_batch, self.recovery, progress.note
        )
        self._stepper.choose = _weakly(self._choose)
        self._clock = _Clock(self.progress.note)
        self.epoch, self.step = 0, 0
        self.best = None if initial is None else Best.of(0, initial, model.state_dict())
        self.last: Score | None = None
        self._meter = Meter()
        self._random: dict[str, Any] | None = None  # of the step that training is resumed at

    def fit(self) -> None:
        """Train for the remaining epochs; the model ends with its last, averaged or best weights (``training.keep``).

        Raises:
            TrainingDiverged: the loss is NaN or infinite.
            DeviceMemoryError: out of memory, however small the micro-batches.
            Interrupted: a signal asked to stop; the state is saved.
        """
        if self._stepper.execution is not None:
            self._stepper.compute(self._stepper.execution)
        if self.radius is not None and not self.radius.source.startswith("training."):
            self.progress.note(f"radius {self.radius.rho:g}: {self.radius.source}")
        try:
            self._epochs()
        finally:
            self._stepper.restore()
        if self.average:
            self.model.load_state_dict(self.average.state_dict())
        if self.training.keep == "best" and self.best is not None:
            self.model.load_state_dict(self.best.model)

    def _epochs(self) -> None:
        """The remaining ones."""
        while self.epoch < self.training.epochs:
            learning_rate = self._begin_epoch()
            name = f"{self.title} {self.epoch + 1} of {self.training.epochs}"
            with self.progress.task(name, len(self.batches)) as task:
                task.advance(self.step)
                if self.step and self.step == len(
                    self.batches
                ):  # interrupted between training and evaluation
                    trained = self._meter.over_ranks().score()
                    self._restore_random()
                else:
                    trained = train_epoch(
                        self._stepper,
                        self.batches,
                        task,
                        self._meter,
                        skip=self.step,
                        after_skip=self._restore_random,
                        after_step=self._after_step,
                    )
            validated = self._evaluate()
            self._log(trained, validated, learning_rate)
            self._end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """Everything that training is resumed from: tensors and plain values. All ranks call this together."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "setbacks": dict(vars(self.recovery)),
            "minimizer": self.minimizer.state_dict(),
            "average": self.average and self.average.state_dict(),
            "position": {"epoch": self.epoch, "step": self.step},
            "ranks": distributed.gathered({"random": random_state(), "meter": dict(vars(self._meter))}),
        }
        if self._stepper.execution is not None:
            state["execution"] = self._stepper.execution.to_dict()
        if self.best is not None:
            state["best"] = self.best.pack()
        if self.last is not None:
            state["validated"] = asdict(self.last)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what ``state_dict`` returned; entries that earlier versions did not write may be missing.

        With another number of ranks the first one takes over all figures of the epoch so far, and random numbers are
        drawn anew.
        """
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "minimizer" in state:
            self.minimizer.load_state_dict(state["minimizer"])
        if "execution" in state:
            self._stepper.compute(Execution.from_dict(state["execution"]))
        elif any(state["position"].values()):  # of a version that computed as written
            half = self.training.precision == "bfloat16"
            self._stepper.compute(Execution(precision="bfloat16" if half else "float32"))
        if self.average:
            self.average.load_state_dict(state["average"])
        vars(self.recovery).update(state.get("setbacks", {}))
        self.epoch, self.step = state["position"]["epoch"], state["position"]["step"]
        self.best = Best.unpack(state["best"]) if "best" in state else None
        self.last = Score(**state["validated"]) if "validated" in state else None
        ranks, index = state.get("ranks", []), distributed.index()
        self._random, self._meter = None, Meter()
        if len(ranks) == distributed.count():
            self._random, ranks = ranks[index]["random"], [ranks[index]]
        elif index:
            ranks = []
        for rank in ranks:
            self._meter.add(Meter(**rank["meter"]))

    def save(self, path: Path) -> None:
        """Write ``state_dict()`` to the file at ``path``, with a checksum, atomically. All ranks call this together.

        Raises:
            CannotWrite: the disk is full, or the folder read-only or gone.
        """
        state = self.state_dict()
        if distributed.first():
            CheckpointFile(path).save(state)

    def load(self, path: Path) -> None:
        """Resume from a file that ``save`` wrote.

        Raises:
            RunDirectoryError: there is none, or it is damaged.
        """
        state = distributed.from_first(CheckpointFile(path).load)
        if state is None:
            raise RunDirectoryError(f"there is no checkpoint {path}")
        self.load_state_dict(state)

    def _choose(self, images: Tensor, labels: Tensor) -> Execution:
        stepper = self._stepper
        epochs = self.training.epochs - self.epoch
        return choose(
            self.training,
            stepper.trial(images, labels),
            stepper.sizes(images, labels),
            epochs * len(self.batches) - self.step,
            self.validation is not None and self.average is None,
            self.model,
            self.progress.note,
        )

    @property
    def execution(self) -> Execution:
        """How passes are computed; as written before the first step."""
        return self._stepper.execution or Execution()

    @property
    def _steps(self) -> int:
        """Steps done before this epoch."""
        return self.epoch * len(self.batches)

    def _begin_epoch(self) -> float:
        """Set schedule and images; the learning rate at the beginning of the epoch."""
        self.schedule.step_update(self._steps)
        learning_rate: float = self.optimizer.param_groups[0]["lr"]
        self._schedule(self.step)
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(self.epoch)
        return learning_rate

    def _schedule(self, step: int) -> None:
        """Set what changes over the training for the step after ``step`` of this epoch."""
        self.schedule.step_update(self._steps + step)
        if self.dampening:
            self.dampening.set((self._steps + step) / self._total)

    def _after_step(self, step: int) -> None:
        """Move schedule and average, save if it is due."""
        self.step = step
        self._schedule(step)
        if self.average:
            self.average.update(self.model, self._steps + step)
        before_evaluation = self.validation is not None and step == len(self.batches)
        self.run.offer(self.state_dict, milestone=before_evaluation, failing=self.recovery.in_row > 0)
        self._clock.tick(step, self._total - self._steps - step)

    def _evaluate(self) -> Score | None:
        """Score of the model, or of its average, on the validation images; the best state is kept."""
        if self.validation is None:
            return None
        model, predict = self._evaluated()
        with self.progress.task("evaluating", len(self.validation)) as task:
            interruptible = InterruptibleTask(task, self.run)
            score = evaluate(
                predict,
                self.validation,
                interruptible,
                device=self._stepper.device,
                shared=True,
                criterion=self._criterion,
                model=model,
            )
        largest = largest_loss(self.num_classes) if self._criterion is None else sys.float_info.max
        check_epoch(score.loss, largest)
        if self.best is None or self.best.beaten_by(score):
            self.best = Best.of(self.epoch + 1, score, model.state_dict())
        self.last = score
        return score

    def _evaluated(self) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        """The model that is evaluated, in eval mode, and what calls it."""
        if self.average:
            return self.average.module, self.average.module
        return self.model.eval(), self._stepper.engine.evaluate

    def _log(self, trained: Score, validated: Score | None, learning_rate: float) -> None:
        """Record the metrics of the epoch, and note the main ones."""
        skipped, epoch = self.recovery.skipped, self.epoch + 1
        self.run.log(phase="train", epoch=epoch, lr=learning_rate, **asdict(trained), steps_skipped=skipped)
        if validated is None:
            return
        self.run.log(phase="val", epoch=epoch, **asdict(validated))
        self.progress.note(
            f"epoch {epoch}: loss {format_figure(trained.loss, '.3f')}, "
            + (
                f"validation {format_figure(validated.loss, '.3f')}"
                if math.isnan(validated.top1)
                else f"training {trained.top1:.2f} %, validation {validated.top1:.2f} %"
            )
            + (f", {counted(skipped, 'step')} skipped" if skipped else "")
        )

    def _end_epoch(self) -> None:
        """Begin the next one at its first step, and save."""
        self._meter.clear()
        self.recovery.skipped = 0
        self.epoch, self.step = self.epoch + 1, 0
        self.run.offer(self.state_dict, milestone=True)

    def _restore_random(self) -> None:
        """The random numbers of the step that training is resumed at."""
        if self._random is not None:
            set_random_state(self._random)


def _weakly(choose: Callable[[Tensor, Tensor], Execution]) -> Callable[[Tensor, Tensor], Execution]:
    """A method as a function that does not keep its object: a trainer is freed when its last user leaves it."""
    method = WeakMethod(choose)

    def call(images: Tensor, labels: Tensor) -> Execution:
        bound = method()
        assert bound is not None
        return bound(images, labels)

    return call


class Average:
    """The exponential moving average of a model's weights and statistics, by timm; short runs average less."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Starts as a copy of ``model``; ``decay`` is that of a long run."""
        from timm.utils import ModelEmaV3

        self._ema = ModelEmaV3(model, decay, use_warmup=True)

    @property
    def module(self) -> nn.Module:
        """The averaged model, in eval mode."""
        module: nn.Module = self._ema.module
        return module

    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` updates of the run."""
        self._ema.update(model, step)

    def state_dict(self) -> dict[str, Any]:
        """Of the averaged model."""
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        self.module.load_state_dict(state)
