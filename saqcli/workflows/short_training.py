"""Training from beginning to end in one go, without checkpoints: for what is over in minutes."""

from collections.abc import Callable

from torch import nn

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
) -> Score:
    """Train for all epochs; the score of the last one, in training.

    Args:
        model: on the device of the images.
        images: to train on.
        training: the settings; ``in_float`` of them for a network without quantizers.
        num_classes: logits of the model.
        title: of an epoch, in front of its number.
        progress: told about every step.
        after_epoch: called with the score of each.

    Raises:
        ConfigError: settings that optimizer, schedule or minimizer do not take.
        TrainingDiverged: the loss is no number any more.
    """
    loader = images.training()
    optimizer = make_optimizer(model, training)
    schedule = make_schedule(optimizer, training, len(loader))
    minimizer = make_minimizer(model, optimizer, training, max(images.preprocessing.input_size[1:]))
    objective = make_objective(training, images.device, num_classes)
    setbacks = Setbacks(training.micro_batch, patience=training.skip_steps)
    score = Score()
    for epoch in range(training.epochs):

        def after_step(step: int, start: int = epoch * len(loader)) -> None:
            schedule.step_update(start + step)

        settings = EpochSettings(
            objective=objective,
            device=images.device,
            sharpness_batch=training.sharpness_batch,
            after_step=after_step,
            setbacks=setbacks,
            note=progress.note,
        )
        after_step(0)
        loader.set_epoch(epoch)
        with progress.task(f"{title} {epoch + 1} of {training.epochs}", len(loader)) as task:
            score = train_epoch(model, minimizer, loader, task, settings, Meter())
        after_epoch(score)
    return score


def in_float(training: TrainingSection, batch_size: int, **changes: object) -> TrainingSection:
    """The settings for a network without quantizers: plain steps, each on a whole batch; and what else changes."""
    plain = {"method": "qat", "minimizer": {}, "sharpness_batch": batch_size, "micro_batch": None}
    return training.model_copy(update=plain | changes)
