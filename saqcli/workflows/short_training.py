"""Training from beginning to end, for what is over in minutes: no validation, no metrics, one file to go on from."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from saqcli import ranks
from saqcli.algorithms.searchers.problem import NO_MEMORY, Memory
from saqcli.algorithms.steps import Setbacks
from saqcli.algorithms.training import EpochSettings, Meter, Score, train_epoch
from saqcli.config import TrainingSection
from saqcli.progress import SILENT, Progress
from saqcli.workflows.optimization import make_minimizer, make_objective, make_optimizer, make_schedule
from saqcli.workflows.setup import Images


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
        if ranks.first():  # takes over the figures of all
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
