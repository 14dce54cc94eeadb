"""The rounding of one layer's weight, learned in a reconstruction and fixed at its end.

``StraightRounding`` trains the latent weight itself, with gradients straight through the rounding: a weight may move by
several codes, and any quantizer can be trained like this. Weights come to rest at the bounds between two codes and go
back and forth (Nagel et al., arXiv:2203.11086). Many weights of a channel average that out; the nine of a depthwise
convolution do not, and its error rises. Where fewer than ``LEAST_WEIGHTS`` share a level, both are kept.

``SoftRounding`` chooses between the two codes next to each weight (AdaRound: Nagel et al., arXiv:2004.10568, Eq. 21 to
24), here on every uniform grid, lowest, lowest + stride, ..., highest:

    base = lowest + stride * floor((w / step - lowest) / stride)             at most highest - stride, at least lowest
    h(V) = clamp(1.2 * sigmoid(V) - 0.1, 0, 1)
    soft = step * (base + stride * h(V))
    f(V) = sum 1 - |2 h(V) - 1|^beta                                         beta falls from 20 to 2

V starts where ``soft`` equals the weight. f, added to the error after a warm-up, drives every h to 0 or 1. At the end
the codes are ``base + stride * (V > 0)``, and the latent weight becomes ``step * code``: dividing it by the step and
rounding gives the code back, whatever is done with the weight. Differs from the paper: steps may be trained together
with V; a weight beyond the ends of the grid may come back by one code.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from saqcli.quant.grid import Grid
from saqcli.quant.layer import QuantizedLayer, stores_codes
from saqcli.quant.quantizers.base import LevelQuantizer, Quantizer
from saqcli.quant.quantizers.learned_step import LearnedStep
from saqcli.reconstruction.adam import Trained
from saqcli.reconstruction.options import Reconstruction

LOW, HIGH = -0.1, 1.1  # range that the sigmoid is stretched to, so that 0 and 1 are reached
FIRST_BETA, LAST_BETA = 20.0, 2.0
LEAST_WEIGHTS = 32  # that share a level, for straight-through training
LEAST_SHARE = 0.01  # of a gap, from either code at the start: keeps the gradient of the sigmoid


class LearnedRounding(Protocol):
    """The rounding of one layer during a reconstruction."""

    trained: list[Trained]

    def prepare(self) -> None:
        """Before a forward pass: let the layer compute with the current weight."""

    def regularizer(self, progress: float) -> Tensor | None:
        """The mean over the weights of a term that drives decisions, at 0 <= progress <= 1; None if there is none."""

    def fix(self) -> None:
        """Leave an ordinary layer, whose latent weight has the codes that were learned."""


def learned_rounding(layer: QuantizedLayer, options: Reconstruction) -> LearnedRounding:
    """The rounding that ``options`` ask for; straight through where codes are not those of the latent weight."""
    if options.rounding == "soft" and SoftRounding.suits(layer):
        return SoftRounding(layer, options.rounding_lr)
    return StraightRounding(layer, options.weight_lr)


class StraightRounding:
    """The latent weight, trained straight through the rounding; see the module's docstring."""

    def __init__(self, layer: QuantizedLayer, rate: float) -> None:
        weight = layer.latent_weight()
        self.trained = (
            [Trained(weight, _gap(layer), rate)] if rate and weights_per_level(layer) >= LEAST_WEIGHTS else []
        )

    def prepare(self) -> None:
        """Nothing: the layer quantizes its weight in every pass."""

    def regularizer(self, progress: float) -> Tensor | None:
        """None."""
        return None

    def fix(self) -> None:
        """Nothing: the layer computes with these codes already."""


class SoftRounding:
    """A choice between two codes for each weight; see the module's docstring."""

    @staticmethod
    def suits(layer: QuantizedLayer) -> bool:
        """Whether the weight's codes are those of the latent weight on a uniform grid, without a transformation."""
        quantizer = layer.weight_quantizer
        if not isinstance(quantizer, LevelQuantizer | LearnedStep):
            return False
        plain = type(quantizer).fold is Quantizer.fold and type(quantizer).codes is Quantizer.codes
        return plain and stores_codes(layer) and isinstance(quantizer.grid(), Grid)

    def __init__(self, layer: QuantizedLayer, rate: float) -> None:
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, Quantizer)
        grid = quantizer.grid()
        assert isinstance(grid, Grid)
        self._layer, self._quantizer, self._grid = layer, quantizer, grid
        scaled = layer.latent_weight().detach() / quantizer.step().detach()
        self._base = lower_codes(scaled, grid)
        share = ((scaled - self._base) / grid.stride).clamp(LEAST_SHARE, 1 - LEAST_SHARE)
        self.logits = torch.logit((share - LOW) / (HIGH - LOW)).requires_grad_(True)
        self.trained = [Trained(self.logits, torch.ones((), device=scaled.device), rate)]

    def prepare(self) -> None:
        """Give the layer its soft weight."""
        codes = self._base + self._grid.stride * rounded_up(self.logits)
        self._layer.given_weight = self._quantizer.step() * codes

    def regularizer(self, progress: float) -> Tensor | None:
        """The mean of 1 - |2 h - 1|^beta."""
        return undecided(rounded_up(self.logits), annealed(progress)).mean()

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes that are chosen at present, float."""
        return self._base + self._grid.stride * (self.logits > 0)

    @torch.no_grad()
    def fix(self) -> None:
        """Make the latent weight the chosen codes times the step."""
        self._layer.given_weight = None
        self._layer.latent_weight().copy_(self.codes() * self._quantizer.step())


def weights_per_level(layer: QuantizedLayer) -> float:
    """How many weights of the layer share a level."""
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, Quantizer)
    return layer.latent_weight().numel() / math.prod(quantizer.shape)


def lower_codes(scaled: Tensor, grid: Grid) -> Tensor:
    """The code below each value, in units of the step, with another one above it."""
    lower = torch.floor((scaled - grid.lowest) / grid.stride) * grid.stride + grid.lowest
    return lower.clamp_(grid.lowest, grid.highest - grid.stride)


def rounded_up(logits: Tensor) -> Tensor:
    """Which share of the way to the upper code a weight takes, h(V)."""
    return (torch.sigmoid(logits) * (HIGH - LOW) + LOW).clamp(0, 1)


def undecided(share: Tensor, beta: float) -> Tensor:
    """1 - |2 h - 1|^beta: 1 in the middle between two codes, 0 on them."""
    return 1 - (2 * share - 1).abs().pow(beta)


def annealed(progress: float) -> float:
    """The exponent, which falls along half a cosine: first only the middle is flat, at the end all but the codes."""
    return LAST_BETA + (FIRST_BETA - LAST_BETA) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def _gap(layer: QuantizedLayer) -> Tensor:
    """The distance between neighboring levels, in units of the latent weight."""
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, Quantizer)
    if type(quantizer).fold is not Quantizer.fold:  # its step has another unit than the weight
        values: Tensor = quantizer(layer.effective_weight())
        levels = quantizer.grid().levels
        return (values.max() - values.min()) / (levels - 1)
    gap: Tensor = quantizer.step() * quantizer.grid().gap
    if stores_codes(layer):
        return gap
    latent, derived = layer.latent_weight(), layer.effective_weight()
    size: Tensor = latent.norm() / derived.norm().clamp_min(torch.finfo(derived.dtype).tiny)
    return gap.mean() * size
