"""Quantization-aware training that can be interrupted at any step and resumed bit-identically.

The best state that fine-tuning met, kept beside the last one: by validation top-1, then loss.

The calibrated state counts as epoch 0. What is exported is the last one, as in published protocols, unless the setting
``training.keep`` says otherwise; the best of many epochs is chosen by the images that it is then evaluated on.

Quantization-aware training of an installed, calibrated model; saved so that it can stop at any step and go
on.

An epoch's images depend on (seed, epoch) alone. A checkpoint inside an epoch holds the number of steps done
and the random states; resuming draws the same images again, passes over those done, and continues bit for
bit.

Training from beginning to end, for what is over in minutes: no validation, no metrics, one file to go on from.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from saqcli import distributed
from saqcli.config import RunConfig, TrainingSection
from saqcli.data.splits import Images
from saqcli.progress import SILENT, Progress, Task
from saqcli.random_state import random_state, set_random_state
from saqcli.runs.directory import RunDirectory, stop_if_asked, stopped
from saqcli.runs.interrupts import StopRequest, deferred_interrupts
from saqcli.training.loop import NO_MEMORY, EpochSettings, Memory, Meter, Score, evaluate, train_epoch
from saqcli.training.minimizers.base import check_epoch
from saqcli.training.optimizer import make_minimizer, make_objective, make_optimizer, make_schedule
from saqcli.training.step import Setbacks
from saqcli.units import counted, format_figure


@dataclass
class Best:
    """A state of the model, and how it did.

    Attributes:
        epoch: number of epochs it was trained for, 0 of the calibrated state.
        score: on the validation images.
        model: its tensors by name, on the CPU.
    """

    epoch: int
    score: Score
    model: Mapping[str, Tensor]

    def beaten_by(self, score: Score) -> bool:
        """Whether ``score``, of a later state, is as good: of equals the later one is kept."""
        return (score.top1, -score.loss) >= (self.score.top1, -self.score.loss)

    @classmethod
    def of(cls, epoch: int, score: Score, model: Mapping[str, Tensor]) -> "Best":
        """A copy of ``model``, which is trained on."""
        return cls(epoch, score, {name: value.detach().cpu().clone() for name, value in model.items()})

    def pack(self) -> dict[str, Any]:
        """Plain values and tensors that a checkpoint can hold."""
        return {"epoch": self.epoch, "score": asdict(self.score), "model": dict(self.model)}

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> "Best":
        """What ``pack`` made."""
        return cls(packed["epoch"], Score(**packed["score"]), packed["model"])


class Trained(NamedTuple):
    """What training left beside the model; None where a checkpoint of an earlier version does not tell.

    Attributes:
        best: the best state of all epochs, and of calibration.
        last: how the state after the last epoch did.
    """

    best: Best | None
    last: Score | None


def noise(one: Score, other: Score) -> float:
    """Standard error of the difference of two top-1s, in percentage points.

    From the numbers of images alone, as if the two were of different images. They are of the same, so that it is
    larger than the real one: what exceeds it is not chance.
    """
    return math.sqrt(sum(s.top1 * (100 - s.top1) / max(s.images, 1) for s in (one, other)))


def advice(calibrated: Score, last: Score | None, best: Best | None, training: TrainingSection) -> str | None:
    """What to change where fine-tuning ended below calibration or below its best epoch by more than noise.

    Args:
        calibrated: before fine-tuning.
        last: after the last epoch; None without fine-tuning.
        best: of all states.
        training: the settings.
    """
    if last is None:
        return None
    keep_best = training.keep == "best"
    if calibrated.top1 - last.top1 > noise(calibrated, last):
        lower = f"a lower `training.lr` than {training.lr:g}, more training images, more `training.epochs`"
        text = (
            f"fine-tuning ended below calibration (top-1 {last.top1:.2f} % after epoch {training.epochs}, "
            f"{calibrated.top1:.2f} % calibrated): try {lower}, or `training.epochs=0` for the calibrated model"
        )
    elif best is not None and best.score.top1 - last.top1 > noise(best.score, last):
        text = (
            f"epoch {best.epoch} was better than the last one (top-1 {best.score.top1:.2f} %, then "
            f"{last.top1:.2f} %): try a lower `training.lr` than {training.lr:g} or other `training.epochs`"
        )
    else:
        return None
    if best is None or best.epoch == training.epochs:
        return text
    what = f"the state of epoch {best.epoch}" if best.epoch else "the calibrated state"
    if keep_best:
        return f"{text}; {what} is exported"
    return f"{text}; `resume=True` `training.keep=best` exports {what}, kept as checkpoints/best.safetensors"


def finetune(
    model: nn.Module,
    config: RunConfig,
    images: Images,
    run: RunDirectory,
    state: dict[str, Any],
    progress: Progress,
    *,
    num_classes: int,
    calibrated: Score,
    teacher: nn.Module | None = None,
) -> Trained:
    """Train to the end of the schedule, from ``state`` on.

    Args:
        model: wrapped, quantizers installed, loaded from ``state``; left with the weights that training found, or
            with their average, or with the best of all epochs, where the settings ask for it.
        config: of the run.
        images: to train on and to score after every epoch.
        run: where checkpoints and metrics go.
        state: the last checkpoint; further ones keep its other entries.
        progress: told about every step.
        num_classes: logits of the model.
        calibrated: score of the model before training.
        teacher: the float model in eval mode, where it is to be learned from.

    Returns:
        The best state, and how the last one did.

    Raises:
        Interrupted: a signal asked to stop; the checkpoint is saved.
        TrainingDiverged: the loss is no number any more.
    """
    training = config.training
    loader = images.training()
    optimizer = make_optimizer(model, training)
    schedule = make_schedule(optimizer, training, len(loader))
    minimizer = make_minimizer(model, optimizer, training, max(images.preprocessing.input_size[1:]))
    average = Average(model, training.ema_decay) if training.ema_decay else None
    position = {"epoch": 0, "step": 0, **state.get("position", {})}
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        if "minimizer" in state:  # not in checkpoints of earlier versions
            minimizer.load_state_dict(state["minimizer"])
        if average:
            average.load_state_dict(state["average"])
    best = first_best(state, calibrated)
    last = Score(**state["validated"]) if "validated" in state else None
    own = own_part(state.get("ranks", []))
    meter = Meter(**own["meter"])
    setbacks = Setbacks(training.micro_batch, patience=training.skip_steps)
    vars(setbacks).update(state.get("setbacks", {}))
    objective = make_objective(training, images.device, num_classes, teacher)
    saved_at = time.monotonic()

    with deferred_interrupts() as stop:

        def save(epoch: int, step: int) -> None:
            """Leave a checkpoint, and stop if a signal asked to."""
            nonlocal saved_at
            state.update(model=model.state_dict(), optimizer=optimizer.state_dict(), setbacks=vars(setbacks))
            state.update(minimizer=minimizer.state_dict(), average=average and average.state_dict())
            state.update(position={"epoch": epoch, "step": step})
            state.update(ranks=distributed.gathered({"random": random_state(), "meter": vars(meter)}))
            run.save_checkpoint(state)
            saved_at = time.monotonic()
            stop_if_asked(stop, run)

        for epoch in range(position["epoch"], training.epochs):
            done = position["step"] if epoch == position["epoch"] else 0
            schedule.step_update(epoch * len(loader))
            lr = optimizer.param_groups[0]["lr"]  # at the beginning of the epoch
            schedule.step_update(epoch * len(loader) + done)

            def after_step(step: int, epoch: int = epoch) -> None:
                schedule.step_update(epoch * len(loader) + step)
                if average:
                    average.update(model, epoch * len(loader) + step)
                due = distributed.first() and time.monotonic() - saved_at > 60 * config.run.checkpoint_minutes
                due = due or step == len(loader)  # before all images are evaluated, too
                due = due and not setbacks.in_row
                if distributed.any_of(due or bool(stop.signal)):
                    save(epoch, step)

            settings = EpochSettings(
                objective=objective,
                device=images.device,
                sharpness_batch=training.sharpness_batch,
                after_step=after_step,
                after_skip=lambda: set_random_state(own["random"]) if own["random"] else None,
                setbacks=setbacks,
                note=progress.note,
            )
            loader.set_epoch(epoch)
            with progress.task(f"epoch {epoch + 1} of {training.epochs}", len(loader)) as task:
                task.advance(done)
                if done < len(loader):
                    trained = train_epoch(model, minimizer, loader, task, settings, meter, skip=done)
                else:  # it was stopped between training and evaluation
                    trained = meter.over_ranks().score()
                    settings.after_skip()
            validation = images.validation()
            judged = average.module if average else model.eval()
            with progress.task("evaluating", len(validation)) as task:
                watched = Watched(task, stop, run)
                score = evaluate(judged, validation, watched, device=images.device, shared=True)
            check_epoch(score.loss, num_classes)
            run.log(phase="train", epoch=epoch + 1, lr=lr, **asdict(trained), steps_skipped=setbacks.skipped)
            run.log(phase="val", epoch=epoch + 1, **asdict(score))
            progress.note(
                f"epoch {epoch + 1}: loss {format_figure(trained.loss, '.3f')}, training {trained.top1:.2f} %, "
                f"validation {score.top1:.2f} %"
                + (f", {counted(setbacks.skipped, 'step')} skipped" if setbacks.skipped else "")
            )
            meter.clear()
            setbacks.skipped = 0
            if best is None or best.beaten_by(score):
                best = Best.of(epoch + 1, score, judged.state_dict())
                state["best"] = best.pack()
            last = score
            state["validated"] = asdict(score)
            save(epoch + 1, 0)
        stop_if_asked(stop, run)  # all epochs may have been done before
    if average:
        model.load_state_dict(average.state_dict())
    if training.keep == "best" and best is not None:
        model.load_state_dict(best.model)
    return Trained(best, last)


def first_best(state: dict[str, Any], calibrated: Score) -> Best | None:
    """The best state so far: as the checkpoint has it, or the calibrated one where training begins; noted in it."""
    if "best" in state:
        return Best.unpack(state["best"])
    if "position" in state:  # a checkpoint of an earlier version, within training
        return None
    best = Best(0, calibrated, state["model"])
    state["best"] = best.pack()
    return best


class Watched:
    """A task that ends at a signal, where all is saved."""

    def __init__(self, task: Task, stop: StopRequest, run: RunDirectory) -> None:
        self._task, self._stop, self._run = task, stop, run

    def advance(self, steps: int = 1, *, images: int = 0, **figures: float) -> None:
        """Tell it, unless a signal has asked to stop.

        Raises:
            Interrupted: one has.
        """
        if self._stop.signal:
            raise stopped(self._run, self._stop.exit_code)
        self._task.advance(steps, images=images, **figures)


def own_part(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What this rank goes on from: figures of the epoch so far, and random numbers.

    Where another number of processes goes on with the run, the first takes over all figures, and random numbers are
    drawn anew.
    """
    if len(parts) == distributed.count():
        return parts[distributed.index()]
    meter = Meter()
    for part in parts if distributed.first() else ():
        meter.add(Meter(**part["meter"]))
    return {"meter": vars(meter), "random": None}


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


def train(
    model: nn.Module,
    images: Images,
    training: TrainingSection,
    num_classes: int,
    *,
    title: str = "epoch",
    progress: Progress = SILENT,
    after_epoch: Callable[[Score], None] = lambda score: None,
    memory: Memory = NO_MEMORY,
) -> Score:
    """Train for all epochs, from where the memory left off; the score of the last one, in training.

    Args:
        model: on the device of the images.
        images: to train on.
        training: the settings; ``in_float`` of them for a network without quantizers.
        num_classes: logits of the model.
        title: of an epoch, in front of its number.
        progress: told about every step.
        after_epoch: called with the score of each, in training.
        memory: for what would be lost.

    Raises:
        ConfigError: settings that optimizer, schedule or minimizer do not take.
        TrainingDiverged: the loss is no number any more.
        Interrupted: asked to stop; the memory holds what was done.
    """
    loader = images.training()
    optimizer = make_optimizer(model, training)
    schedule = make_schedule(optimizer, training, len(loader))
    minimizer = make_minimizer(model, optimizer, training, max(images.preprocessing.input_size[1:]))
    objective = make_objective(training, images.device, num_classes)
    setbacks, meter = Setbacks(training.micro_batch, patience=training.skip_steps), Meter()
    begin, done = 0, 0
    if (kept := memory.load()) is not None:
        for part, name in ((model, "model"), (optimizer, "optimizer"), (minimizer, "minimizer")):
            part.load_state_dict(kept[name])
        vars(setbacks).update(kept["setbacks"])
        if distributed.first():  # takes over the figures of all
            vars(meter).update(kept["meter"])
        begin, done = kept["position"]
        memory.restore_random()
    score = Score()
    for epoch in range(begin, training.epochs):

        def state(step: int, epoch: int = epoch) -> dict[str, Any]:
            return {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "minimizer": minimizer.state_dict(),
                "setbacks": vars(setbacks),
                "meter": vars(meter.over_ranks()),
                "position": [epoch, step],
            }

        def after_step(step: int, start: int = epoch * len(loader)) -> None:
            schedule.step_update(start + step)
            if not setbacks.in_row:
                memory.offer(partial(state, step))

        settings = EpochSettings(
            objective=objective,
            device=images.device,
            sharpness_batch=training.sharpness_batch,
            after_step=after_step,
            after_skip=memory.restore_random,
            setbacks=setbacks,
            note=progress.note,
        )
        schedule.step_update(epoch * len(loader) + done)
        loader.set_epoch(epoch)
        with progress.task(f"{title} {epoch + 1} of {training.epochs}", len(loader)) as task:
            task.advance(done)
            score = train_epoch(model, minimizer, loader, task, settings, meter, skip=done)
        after_epoch(score)
        meter.clear()
        done = 0
        memory.offer(partial(state, 0, epoch + 1), milestone=True)
    return score


def in_float(training: TrainingSection, batch_size: int, **changes: object) -> TrainingSection:
    """The settings for a network without quantizers: plain steps, each on a whole batch; and what else changes."""
    plain = {"method": "qat", "minimizer": {}, "sharpness_batch": batch_size, "micro_batch": None}
    return training.model_copy(update=plain | changes)
