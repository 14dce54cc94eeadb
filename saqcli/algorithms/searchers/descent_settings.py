"""What can be said of how ASGA searches. The formulas stand in ``asga``."""

from dataclasses import dataclass
from typing import Literal, get_args

from saqcli.algorithms.options import check_choice, check_count, check_flag, check_number
from saqcli.algorithms.sharpness import RadiusUnit
from saqcli.errors import ConfigError

Align = Literal["sagm", "none"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How ASGA searches: its options.

    Attributes:
        epochs: passes over the images; a fraction ends within one.
        step_images: of a batch, for one step.
        rho_min: least radius.
        rho_max: greatest radius, and the first.
        rho_unit: ``deviation`` (of each layer's weights) or ``absolute``.
        alignment: ``a``, how far the ascent is drawn back along the gradient, which aligns the two gradients.
        align: ``sagm``, or ``none`` for the same search on the plain loss, without a second pass.
        cost_weight: ``lambda``.
        logit_lr: first learning rate of the logits.
        temperature_end: softmax temperature at the last step, from 1 at the first; 1 keeps it.
        bilevel: learn the logits on held-out images.

    Raises:
        ConfigError: a word that is not among an option's choices, or a number out of range.
    """

    epochs: float = 0.25
    step_images: int = 32
    rho_min: float = 0.01
    rho_max: float = 0.1
    rho_unit: RadiusUnit = "deviation"
    alignment: float = 1e-3
    align: Align = "sagm"
    cost_weight: float = 3.0
    logit_lr: float = 0.1
    temperature_end: float = 1.0
    bilevel: bool = False

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, 0)
        if not self.epochs:
            raise ConfigError(f"epochs {self.epochs!r} is not possible: give more than 0")
        check_number("rho_min", self.rho_min, 0)
        check_number("rho_max", self.rho_max, self.rho_min)
        for option in ("alignment", "cost_weight", "logit_lr"):
            check_number(option, getattr(self, option), 0)
        check_number("temperature_end", self.temperature_end, 0.01)
        check_count("step_images", self.step_images)
        check_flag("bilevel", self.bilevel)
        check_choice("rho_unit", self.rho_unit, get_args(RadiusUnit))
        check_choice("align", self.align, get_args(Align))
