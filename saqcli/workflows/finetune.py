"""Quantization-aware training of an installed, calibrated model; saved so that it can stop at any step and go
on.

An epoch's images depend on (seed, epoch) alone. A checkpoint inside an epoch holds the number of steps done
and the random states; resuming draws the same images again, passes over those done, and continues bit for
bit.
"""

import random
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from saqcli.algorithms.divergence import check_epoch
from saqcli.algorithms.minimizers import MINIMIZERS, Minimizer
from saqcli.algorithms.training import EpochSettings, Meter, evaluate, train_epoch
from saqcli.config import RunConfig, TrainingSection
from saqcli.errors import ConfigError, Interrupted
from saqcli.io.interrupts import StopRequest, deferred_interrupts
from saqcli.io.runs import RunDirectory
from saqcli.progress import Progress
from saqcli.quant.layers import quantized_layers
from saqcli.quant.quantizers import quantizers_of
from saqcli.workflows.setup import SMALL_IMAGES, Images

# Liu et al. (arXiv:2111.12273), section 5: radius by bit-width, for images of 32 and of 224 pixels.
SMALL_IMAGE_RHO = {2: 0.4, 3: 0.7, 4: 0.9}
LARGE_IMAGE_RHO = {2: 0.15, 3: 0.15, 4: 0.3}


def finetune(
    model: nn.Module,
    config: RunConfig,
    images: Images,
    run: RunDirectory,
    state: dict[str, Any],
    progress: Progress,
) -> None:
    """Train to the end of the schedule, from ``state`` on.

    Args:
        model: wrapped, quantizers installed, loaded from ``state``.
        config: of the run.
        images: to train on and to score after every epoch.
        run: where checkpoints and metrics go.
        state: the last checkpoint; further ones keep its other entries.
        progress: told about every step.

    Raises:
        Interrupted: a signal asked to stop; the checkpoint is saved.
        TrainingDiverged: the loss is no number any more.
    """
    training = config.training
    loader = images.training()
    optimizer = make_optimizer(model, training)
    schedule = make_schedule(optimizer, training, len(loader))
    minimizer = make_minimizer(model, optimizer, config, max(images.preprocessing.input_size[1:]))
    position = {"epoch": 0, "step": 0, **state.get("position", {})}
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
    meter = Meter(**state.get("meter", {}))
    saved_at = time.monotonic()

    def save(epoch: int, step: int) -> None:
        state.update(model=model.state_dict(), optimizer=optimizer.state_dict(), meter=vars(meter))
        state.update(position={"epoch": epoch, "step": step}, random=random_state())
        run.save_checkpoint(state)

    with deferred_interrupts() as stop:
        for epoch in range(position["epoch"], training.epochs):
            done = position["step"] if epoch == position["epoch"] else 0
            schedule.step_update(epoch * len(loader) + done)

            lr = optimizer.param_groups[0]["lr"]

            def after_step(step: int, epoch: int = epoch) -> None:
                nonlocal saved_at
                schedule.step_update(epoch * len(loader) + step)
                due = time.monotonic() - saved_at > 60 * config.run.checkpoint_minutes
                if stop.signal or due:
                    save(epoch, step)
                    saved_at = time.monotonic()
                if stop.signal:
                    raise _interrupted(stop, run)

            settings = EpochSettings(
                criterion=nn.CrossEntropyLoss(label_smoothing=training.label_smoothing),
                device=images.device,
                sharpness_batch=training.sharpness_batch,
                after_step=after_step,
                after_skip=lambda: set_random_state(state["random"]),
                autocast=lambda: _autocast(training, images.device),
            )
            loader.set_epoch(epoch)
            with progress.task(f"epoch {epoch + 1} of {training.epochs}", len(loader)) as task:
                task.advance(done)
                trained = train_epoch(model, minimizer, loader, task, settings, meter, skip=done)
            validation = images.validation()
            model.eval()
            with progress.task("evaluating", len(validation)) as task:
                score = evaluate(model, validation, task, device=images.device)
            check_epoch(score.loss, len(images.val.class_names))
            run.log(phase="train", epoch=epoch + 1, lr=lr, **asdict(trained))
            run.log(phase="val", epoch=epoch + 1, **asdict(score))
            progress.note(
                f"epoch {epoch + 1}: loss {trained.loss:.3f}, training {trained.top1:.2f} %, "
                f"validation {score.top1:.2f} %"
            )
            meter.clear()
            save(epoch + 1, 0)
            saved_at = time.monotonic()
            if stop.signal:
                raise _interrupted(stop, run)


def make_optimizer(model: nn.Module, training: TrainingSection) -> torch.optim.Optimizer:
    """timm's optimizer of that name; what quantizers learn has a group of its own."""
    from timm.optim import create_optimizer_v2

    clips = [p for quantizer in quantizers_of(model) for p in quantizer.parameters()]
    ids = {id(p) for p in clips}
    others = [p for p in model.parameters() if id(p) not in ids]
    groups = [
        {"params": others, "weight_decay": training.weight_decay},
        {
            "params": clips,
            "lr": training.lr * training.clip_lr_factor,
            "weight_decay": training.weight_decay if training.decay_clips else 0.0,
        },
    ]
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, training.optimizer, lr=training.lr, momentum=training.momentum
        )
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"timm has no optimizer {training.optimizer!r}, or not with these settings: {error}"
        ) from None
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, training: TrainingSection, steps: int) -> Any:
    """timm's schedule of that name, stepped after every update; ``steps`` an epoch."""
    from timm.scheduler import create_scheduler_v2

    try:
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched=training.schedule,
            num_epochs=training.epochs,
            warmup_epochs=training.warmup_epochs,
            decay_milestones=list(training.milestones),
            decay_rate=0.1,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"timm has no schedule {training.schedule!r}, or not so: {error}") from None
    if schedule is None:
        raise ConfigError(
            f"training.schedule {training.schedule!r} moves nothing: give constant, cosine or step"
        )
    return schedule


def make_minimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, side: int
) -> Minimizer:
    """The method's minimizer, with the paper's radius where none is given."""
    training = config.training
    options = dict(training.minimizer)
    if training.method != "qat":
        rho = default_rho(model, side) if training.rho is None else training.rho
        options = {"rho": rho, "rho_unit": training.rho_unit, **options}
    try:
        return MINIMIZERS[training.method](model, optimizer, **options)
    except TypeError as error:
        reason = str(error).rpartition("() ")[2]
        raise ConfigError(f"method {training.method} does not take these options: {reason}") from None


def check_training(config: RunConfig) -> None:
    """Refuse options that optimizer, schedule or minimizer do not take, before any time is spent.

    Raises:
        ConfigError: names the option.
    """
    model = nn.Linear(1, 1)
    optimizer = make_optimizer(model, config.training)
    make_minimizer(model, optimizer, config, side=SMALL_IMAGES)
    if config.training.epochs:
        make_schedule(optimizer, config.training, steps=1)


def default_rho(model: nn.Module, side: int) -> float:
    """The paper's radius for the mean bit-width of the free layers' weights and images of ``side`` pixels."""
    widths = [layer.bits.weight or 8 for layer in quantized_layers(model).values()]
    free = [bits for bits in widths if bits < 8] or [8]
    nearest = min(4, max(2, round(sum(free) / len(free))))
    return (SMALL_IMAGE_RHO if side <= SMALL_IMAGES else LARGE_IMAGE_RHO)[nearest]


def random_state() -> dict[str, Any]:
    """Of Python, NumPy and torch, in values that a checkpoint can hold."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` noted."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _autocast(training: TrainingSection, device: torch.device) -> AbstractContextManager[Any]:
    if training.precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _interrupted(stop: StopRequest, run: RunDirectory) -> Interrupted:
    error = Interrupted(f"stopped as asked, the work so far is saved: {run.how_to_resume()}")
    error.exit_code = stop.exit_code
    return error
