"""Quantization-aware training of an installed, calibrated model; saved so that it can stop at any step and go
on.

An epoch's images depend on (seed, epoch) alone. A checkpoint inside an epoch holds the number of steps done
and the random states; resuming draws the same images again, passes over those done, and continues bit for
bit.
"""

import time
from dataclasses import asdict
from typing import Any

from torch import nn

from saqcli import ranks
from saqcli.algorithms.divergence import check_epoch
from saqcli.algorithms.random_state import random_state, set_random_state
from saqcli.algorithms.steps import Setbacks
from saqcli.algorithms.training import EpochSettings, Meter, Score, evaluate, train_epoch
from saqcli.config import RunConfig
from saqcli.io.interrupts import StopRequest, deferred_interrupts
from saqcli.io.runs import RunDirectory
from saqcli.progress import Progress, Task
from saqcli.units import counted, format_figure
from saqcli.workflows.best import Best, Trained
from saqcli.workflows.optimization import make_minimizer, make_objective, make_optimizer, make_schedule
from saqcli.workflows.resuming import stop_if_asked, stopped
from saqcli.workflows.setup import Images


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
            state.update(ranks=ranks.gathered({"random": random_state(), "meter": vars(meter)}))
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
                due = ranks.first() and time.monotonic() - saved_at > 60 * config.run.checkpoint_minutes
                due = due or step == len(loader)  # before all images are evaluated, too
                due = due and not setbacks.in_row
                if ranks.any_of(due or bool(stop.signal)):
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
                + (f", {counted(setbacks.skipped, 'step')} left out" if setbacks.skipped else "")
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
    if len(parts) == ranks.count():
        return parts[ranks.index()]
    meter = Meter()
    for part in parts if ranks.first() else ():
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
