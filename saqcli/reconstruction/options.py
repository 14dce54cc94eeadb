"""The settings of a reconstruction; their defaults reach the figures in ``docs/reconstruction.md``."""

from dataclasses import dataclass
from typing import Literal

from saqcli.errors import ConfigError
from saqcli.training.options import check_choice, check_count, check_number

Rounding = Literal["straight", "soft"]
Weighting = Literal["none", "fisher"]
Form = Literal["gradient", "descent"]


@dataclass(frozen=True)
class Reconstruction:
    """How the blocks of a quantized network are fitted to those of its float network.

    Learning rates are relative, so that one value suits every layer: a rate of 0.015 moves a weight by at most about
    1.5 % of its step in one iteration. They fall to zero along half a cosine.

    Attributes:
        iterations: of each block; with 0 nothing changes.
        batch_size: images of an iteration.
        most_values: most values that the inputs and outputs of a block's layers have together in an iteration; a block
            with more takes fewer images, since each has many positions then.
        drop: probability that a value of the block's input is the float network's instead of the quantized prefix's, as
            in QDrop (arXiv:2203.05740).
        drop_inputs: probability that a value of the input of a layer within the block is not quantized, as in QDrop.
        rounding: ``straight`` trains the latent weights straight through the rounding; ``soft`` learns between the two
            codes next to each weight, as AdaRound (arXiv:2004.10568).
        weight_lr: learning rate of latent weights, in steps of the weight.
        rounding_lr: learning rate of ``soft`` rounding, in its logits.
        weight_level_lr: learning rate of the levels of weights, relative to these; 0 keeps them.
        input_level_lr: the same for the levels of inputs.
        bias_lr: learning rate of the layers' biases, relative to the scale of the output; 0 keeps them.
        regularization: weight of the term that drives ``soft`` rounding to a decision.
        warm_up: share of the iterations before that term starts.
        weighting: ``none`` weights all errors equally; ``fisher`` by the squared gradients of the loss, as BRECQ
            (arXiv:2102.05426).
        form: ``gradient`` trains by backward passes; ``descent`` chooses the codes of weights layer by layer, by
            coordinate descent (``coordinate_descent``): quick, and of these settings only ``iterations``, up to four
            sweeps, and ``batch_size`` matter.
        noise_radius: radius of sharpness-aware reconstruction, relative to the noise of the block's input; 0 for none.

    Raises:
        ConfigError: a value that is not possible.
    """

    iterations: int = 150
    batch_size: int = 48
    most_values: int = 4_000_000
    drop: float = 0.5
    drop_inputs: float = 0.0
    rounding: Rounding = "straight"
    weight_lr: float = 0.015
    rounding_lr: float = 0.05
    weight_level_lr: float = 0.004
    input_level_lr: float = 0.003
    bias_lr: float = 0.0
    regularization: float = 0.1
    warm_up: float = 0.2
    weighting: Weighting = "none"
    noise_radius: float = 0.0
    form: Form = "gradient"

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations, 0)
        check_count("batch_size", self.batch_size)
        check_count("most_values", self.most_values)
        check_choice("rounding", self.rounding, ("straight", "soft"))
        check_choice("form", self.form, ("gradient", "descent"))
        check_choice("weighting", self.weighting, ("none", "fisher"))
        for name in ("drop", "drop_inputs", "warm_up"):
            value = getattr(self, name)
            check_number(name, value, 0)
            if value > 1:
                raise ConfigError(f"{name} {value!r} is not possible: give a number from 0 to 1")
        for name in _RATES:
            check_number(name, getattr(self, name), 0)


_RATES = (
    "weight_lr",
    "rounding_lr",
    "weight_level_lr",
    "input_level_lr",
    "bias_lr",
    "regularization",
    "noise_radius",
)
