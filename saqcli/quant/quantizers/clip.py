"""SAQ's quantizer: uniform, with a learned clipping level.

The gradient of the level is the rounding residual. Weights use the paper's odd-integer grid or the integer grid,
activations [0, a] or, where the input is signed, the signed grid with the same number of levels. Formulas and gradients
are given in ``grid.py``.

With weight normalization a weight is quantized in standard deviations from its mean, both taken over the whole tensor
and held constant in the gradient:

    Q(w)   = fake_quantize(w - mean(w), a * std(w))
    dL/dw  = G * inside          dL/da = std(w) * dL/dlevel

or, without ``restores_deviation``, as published:

    Q(w)   = fake_quantize((w - mean(w)) / std(w), a)
    dL/dw  = G * inside / std(w)

Source: Liu et al., arXiv:2111.12273, section 3, and the released code, whose normalization is that of APoT
(arXiv:1909.13144). Differs from the paper:

- By default levels start at the least squared error and weights are not normalized, so that wrapping a
  pretrained network keeps its function as well as the bits allow. ``fit_as_published`` starts as in the paper.
- The normalized weight is multiplied by its deviation again (decision 0011): before a batch norm this makes no
  difference, and running statistics and networks without batch norm keep working. Where outputs are added before the
  next batch norm, as in pre-activation residual networks, it does: ``restores_deviation=False`` is the paper's form.
"""

from typing import ClassVar

import torch
from torch import Tensor

from saqcli.quant.clip_init import best_level
from saqcli.quant.grid import fake_quantize, full_precision
from saqcli.quant.quantizers.base import LevelQuantizer, Quantizer

LEAST_DEVIATION = 1e-8  # for a constant weight
PUBLISHED_LEVEL = 1.0  # of convolutions, whose weights have deviation 1 in the paper
PUBLISHED_FRACTION = 0.8  # of the largest magnitude, for other layers, as in the released code


class _Clip(LevelQuantizer):
    def forward(self, x: Tensor) -> Tensor:
        """``x`` clamped to the clipping level and rounded onto the grid."""
        return fake_quantize(x, self.level(), self.grid(), self.kernel)

    @torch.no_grad()
    def fit_as_published(self, x: Tensor, *, linear: bool) -> None:
        """1 for convolutions, 0.8 of the largest magnitude for other layers; the same for all candidates."""
        level = PUBLISHED_FRACTION * float(x.abs().max()) if linear else self._published_level(x)
        self.clipping_level.fill_(level if level > 0 else PUBLISHED_LEVEL)

    def _published_level(self, x: Tensor) -> float:
        return PUBLISHED_LEVEL


class ClipWeight(_Clip):
    """Weights: one level per output channel or per tensor."""

    def _published_level(self, x: Tensor) -> float:
        return float(_mean_and_deviation(x)[1])  # equals level 1 of normalized weights


class ClipActivation(_Clip):
    """Inputs of a layer: one level."""

    @torch.no_grad()
    def fit_as_published(self, x: Tensor, *, linear: bool) -> None:
        """As in the base class, except that signed inputs start at the least squared error.

        The paper keeps one kind of them, the image, in floating point and clips the others, after linear bottlenecks,
        at 0.
        """
        if self.grid().lowest < 0:
            self.fit(x)
        else:
            super().fit_as_published(x, linear=linear)


class NormalizedClipWeight(ClipWeight):
    """Weights in standard deviations from their mean; levels and ``step()`` have this unit until folded.

    Attributes:
        plain: class of the folded form.
        restores_deviation: whether the quantized weight is multiplied by the deviation of the float weight again; a
            plain attribute, in no state dict.
    """

    plain: ClassVar[type[ClipWeight]] = ClipWeight
    restores_deviation: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """``x`` minus its mean, on the grid of level ``a * std(x)``; both divided by ``std(x)`` if that is dropped."""
        x = full_precision(x)
        mean, deviation = _mean_and_deviation(x)
        level = self.clipping_level[self._active]
        if not self.restores_deviation:
            return fake_quantize((x - mean) / deviation, self.shortened(level), self.grid(), self.kernel)
        return fake_quantize(x - mean, self.shortened(level * deviation), self.grid(), self.kernel)

    def dropped_deviation(self, x: Tensor) -> Tensor | None:
        """The deviation of ``x``, unless it is restored."""
        return None if self.restores_deviation else _mean_and_deviation(x)[1]

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The codes of ``x`` minus its mean, in the unit of the levels."""
        plain, centred = self.fold(x.detach().float())
        return plain.codes(centred)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Levels of least error on the centred weight."""
        mean, deviation = _mean_and_deviation(x)
        for row, grid in zip(self.clipping_level, self.grids.values(), strict=True):
            row.copy_(best_level(x - mean, grid, self.shape, self.error_power) / deviation)

    def _published_level(self, x: Tensor) -> float:
        return PUBLISHED_LEVEL

    @torch.no_grad()
    def unrounded(self, weight: Tensor) -> Tensor:
        """``weight`` normalized."""
        return self.fold(weight)[1]

    @torch.no_grad()
    def fold(self, weight: Tensor) -> tuple[Quantizer, Tensor]:
        """``plain`` with levels ``a * std``, and ``weight`` minus its mean; without ``std`` if that is dropped."""
        mean, deviation = _mean_and_deviation(weight)
        plain = self.plain(self.grids, self.shape).to(self.clipping_level)
        plain.clipping_level.copy_(
            self.clipping_level * deviation if self.restores_deviation else self.clipping_level
        )
        plain.select(self.bits)
        plain.step_bits = self.step_bits
        return plain, weight - mean if self.restores_deviation else (weight - mean) / deviation


@torch.no_grad()
def _mean_and_deviation(w: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of the whole tensor, constants to autograd; a single element has mean 0."""
    if w.numel() == 1:
        return w.new_zeros(()), w.abs().sum().clamp_min(LEAST_DEVIATION)
    return w.mean(), w.std().clamp_min(LEAST_DEVIATION)
