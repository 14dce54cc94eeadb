"""Optimizer, schedule, minimizer and objective from the settings."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.config import RunConfig, TrainingSection
from saqcli.errors import ConfigError, Problems
from saqcli.models.preprocessing import SMALL_IMAGES
from saqcli.quant.convert import wrap
from saqcli.quant.quantizers import quantizers_of
from saqcli.tasks import classification
from saqcli.training.minimizers import MINIMIZERS, Minimizer
from saqcli.training.objective import Objective
from saqcli.training.options import accepted
from saqcli.training.perturbation import PerturbedSet
from saqcli.training.radii import Radius, published_radius
from saqcli.units import counted


def search_training(config: RunConfig) -> TrainingSection:
    """The training section with the optimizer settings of the search."""
    own = {name: getattr(config.search, name) for name in ("optimizer", "lr", "weight_decay")}
    return config.training.model_copy(update={**own, "clip_grad": None})


def in_float(training: TrainingSection, batch_size: int, **changes: object) -> TrainingSection:
    """The training section for a network without quantizers: plain steps on whole batches, with further ``changes``."""
    plain = {
        "method": "qat",
        "minimizer": {},
        "sharpness_batch": batch_size,
        "micro_batch": None,
        "ema_decay": 0.0,
        "dampening": 0.0,
        "compile": "off",
        "memory_format": "contiguous",
    }
    return training.model_copy(update=plain | changes)


def make_optimizer(model: nn.Module, training: TrainingSection) -> torch.optim.Optimizer:
    """timm's optimizer by name, with a separate group for the parameters of quantizers."""
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
    if getattr(optimizer, "is_second_order", False):
        raise ConfigError(
            f"`training.optimizer={training.optimizer}` differentiates twice, which quantizers do not pass on: "
            "choose another"
        )
    if training.clip_grad is not None:
        most = training.clip_grad

        def clip(*_: Any) -> None:
            nn.utils.clip_grad_norm_([*others, *clips], most)

        inner = getattr(optimizer, "_base_optimizer", optimizer)  # timm's lookahead runs no hooks of its own
        inner.register_step_pre_hook(clip)
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
        reason = f": {error}" if str(error) else f" over {counted(training.epochs, 'epoch')}"
        raise ConfigError(f"timm has no schedule {training.schedule!r}, or not so{reason}") from None
    if schedule is None:
        raise ConfigError(
            f"training.schedule {training.schedule!r} moves nothing: give constant, cosine or step"
        )
    return schedule


def chosen_radius(model: nn.Module, training: TrainingSection, side: int, network: str = "") -> Radius:
    """The radius of the settings, or the published one for this network and images of ``side`` pixels."""
    given = training.minimizer.get("rho", training.rho)
    if given is None:
        return published_radius(model, side, network)
    return Radius(given, "training.minimizer.rho" if "rho" in training.minimizer else "training.rho")


def make_minimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: TrainingSection,
    radius: Radius,
    steps: int = 0,
) -> Minimizer:
    """The method's minimizer, with the radius that ``chosen_radius`` found.

    ``steps`` is their number in the whole training, of which ``training.sharpness_from`` is a share; the last one
    ascends in any case.
    """
    make = MINIMIZERS.find(training.method)
    taken, needed = accepted(make)
    settings = {
        "rho": (
            radius.rho if training.rho is None else training.rho,
            training.rho is not None,
            "training.rho",
        ),
        "rho_unit": (training.rho_unit, training.rho_unit != "deviation", "training.rho_unit"),
        "perturb": (_perturbed(make, training), training.perturb != "all", "training.perturb"),
        "start": (
            min(round(training.sharpness_from * steps), max(0, steps - 1)),
            training.sharpness_from != 0,
            "training.sharpness_from",
        ),
        "interval": (training.sam_interval, training.sam_interval != 1, "training.sam_interval"),
        "reuse": (training.sam_reuse, training.sam_reuse != 0, "training.sam_reuse"),
    }
    options = {name: value for name, (value, _, _) in settings.items() if name in taken}
    unknown = [
        f"`{setting}`"
        for name, (_, given, setting) in settings.items()
        if given and name not in taken and name not in make.ignored
    ]
    unknown += [f"`training.minimizer.{name}`" for name in training.minimizer if name not in taken]
    doubled = [
        f"`{setting}` and `training.minimizer.{name}={training.minimizer[name]}`"
        for name, (value, given, setting) in settings.items()
        if given and name in training.minimizer and _plain(training.minimizer[name]) != _plain(value)
    ]
    if doubled:
        raise ConfigError(f"{', '.join(doubled)} differ: give one of the two")
    options |= training.minimizer
    missing = [f"`training.minimizer.{name}`" for name in needed if name not in options]
    if unknown:
        raise ConfigError(
            f"method {training.method} does not take {', '.join(unknown)}: "
            + (f"it takes {', '.join(taken)}" if taken else "it takes no options")
        )
    if missing:
        raise ConfigError(f"method {training.method} needs {', '.join(missing)}: give a value")
    return make(model, optimizer, **options)


def check_perturbed(model: nn.Module, training: TrainingSection) -> None:
    """Refuse ``training.perturb`` if the wrapped ``model`` has nothing of it.

    Raises:
        ConfigError: names the setting.
    """
    make = MINIMIZERS.find(training.method)
    kinds: Any = _perturbed(make, training)
    if kinds is None or "perturb" not in accepted(make)[0]:
        return
    found = PerturbedSet(model, kinds, frozen=False)
    if not (found.layers or found.parameters):
        raise ConfigError(
            f"`training.perturb={training.perturb}` was asked for and the network has no trained {training.perturb} "
            "(short steps fold norms into layers): use `training.perturb=all`, or another method"
        )


def _plain(value: object) -> object:
    """Tuples as lists, as TOML has them."""
    return list(value) if isinstance(value, tuple) else value


def _perturbed(make: Any, training: TrainingSection) -> tuple[str, ...] | None:
    """The kinds that ``training.perturb`` means; None for those of the method."""
    if training.perturb == "all":
        return None
    if training.perturb == "norms":
        return ("norms",)
    ends = ("weights", "biases") if training.perturb == "layers" else ("weights",)
    return tuple(kind for kind in getattr(make, "perturbed_kinds", ends) if kind.endswith(ends))


def make_objective(
    training: TrainingSection,
    device: torch.device,
    num_classes: int,
    teacher: Callable[[Tensor], Tensor] | None = None,
) -> Objective:
    """What is minimized: cross-entropy, with the mixing, smoothing and distillation that the settings ask for.

    The precision of the passes is that of the step's ``Execution``.

    Args:
        training: the settings.
        device: of the model.
        num_classes: logits of the model.
        teacher: the float model, where it is to be learned from.
    """
    half = partial(torch.autocast, device.type, dtype=torch.bfloat16)
    return Objective(
        criterion=classification.criterion(training),
        mix=classification.mixing(training, num_classes),
        distillation=classification.Distillation(
            teacher, training.distill_weight, training.distill_temperature
        )
        if teacher
        else None,
        ascent_autocast=None if training.ascent_precision == "same" else half,
        ascent_fraction=training.ascent_fraction,
    )


def check_training(config: RunConfig) -> None:
    """Refuse options that optimizer, schedule, minimizer or objective do not take, before any time is spent.

    Raises:
        ConfigError: names all of them.
    """
    training, problems = config.training, Problems()
    model = nn.Sequential(nn.Linear(1, 1))
    wrap(model)
    problems.attempt(make_optimizer, model, training)
    plain = training.model_copy(update={"optimizer": "sgd"})
    radius = chosen_radius(model, training, SMALL_IMAGES)
    problems.attempt(make_minimizer, model, make_optimizer(model, plain), training, radius)
    if training.epochs:
        problems.attempt(make_schedule, make_optimizer(model, plain), training, steps=1)
    problems.attempt(_check_reuse, training)
    if training.dampening and not config.quantization.restore_deviation:
        problems.add(
            ConfigError(
                "`training.dampening` pulls weights to their levels, which lie elsewhere with "
                "`quantization.restore_deviation=false`: remove one of them"
            )
        )
    problems.attempt(_check_mixing, training, config.data.batch_size)
    problems.check()


def _check_reuse(training: TrainingSection) -> None:
    if training.ascent_fraction < 1 and MINIMIZERS.find(training.method).wants_plain:
        raise ConfigError(
            f"method {training.method} compares gradients of the same images: remove `training.ascent_fraction`"
        )
    cheaper = {
        "ascent_fraction": training.ascent_fraction < 1,
        "ascent_precision": training.ascent_precision != "same",
    }
    given = [f"`training.{name}`" for name, asked in cheaper.items() if asked]
    if given and MINIMIZERS.find(training.method).one_pass:
        raise ConfigError(
            f"method {training.method} has no pass for the ascent that could be cheaper: remove {', '.join(given)}"
        )
    if training.sam_reuse and (training.sam_interval == 1 or training.ascent_fraction < 1):
        raise ConfigError(
            "`training.sam_reuse` reuses the last perturbation in the steps between, and compares gradients of the "
            "same images: use `training.sam_interval=2` or more, and no `training.ascent_fraction`"
        )


def _check_mixing(training: TrainingSection, batch_size: int) -> None:
    pairs = 2 * distributed.count()
    if (training.mixup or training.cutmix) and batch_size % pairs:
        raise ConfigError(
            f"`data.batch_size={batch_size}` cannot be mixed: images are blended in pairs, in each of "
            f"{counted(distributed.count(), 'process')}, give a multiple of {pairs}"
        )


class Rates:
    """The learning rates of some optimizers, as multiples of their current values.

    Args:
        optimizers: whose groups are scheduled; they may load a state later.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers
        self._first = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    def cosine(self, done: float) -> None:
        """Set the rates of a cosine to 0 for the share ``done`` of all steps."""
        self.scale((1 + math.cos(math.pi * done)) / 2)

    def scale(self, factor: float) -> None:
        """Set all rates to ``factor`` times the first ones."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self._first, strict=True):
            group["lr"] = rate * factor
