"""Asymmetric ranges: consecutive codes from a lowest one that calibration chooses, and a learned step.

Weights have a step s and a lowest code l per output channel or per tensor, the inputs of a layer one of both:

    Q(x)   = s * clamp(round(x / s), l, l + top)        top = 2**bits - 1, -top <= l <= 0, so that 0 is a code

    dL/dx  = G * inside                                 straight through the rounding
    dL/ds  = g * sum G * [ inside * (round(x / s) - x / s) + below * l + above * (l + top) ]
    g      = 1 / sqrt(N * top)                          N values share the step: weights, or inputs of an image

A signed grid has as many codes below zero as above. A channel whose weights reach further on one side, or an input
such as that of GELU, wastes codes on it; here every channel's range follows its values. A value is the step times its
code, as on every grid, and the codes of weights of up to 7 bits fit INT8 without a zero point.

The search for s and l (``clip_init.best_ranges``) begins at the signed grid, so that the error is never above its. The
lowest code is an integer and not trained. ``lsq_plus``, in comparison, has asymmetric inputs alone, and trains their
offset.

Source: the affine quantization of Jacob et al., arXiv:1712.05877, section 2.1, with the step's gradient of Esser et
al., arXiv:1902.08153. Differs from them:

- At 8 bits weights have the symmetric INT8 grid, -127 ... 127, which integer kernels expect: nothing is gained there by
  a shift, and codes from -255 to 255 would need 16 bits.
- Ranges are searched for the least error; the first paper takes minima and maxima of weights, and means of those of
  inputs.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from saqcli.quant.clip_init import best_level, best_range, best_ranges
from saqcli.quant.grid import (
    TINY,
    AnyGrid,
    Grid,
    ShiftedGrid,
    WeightGrid,
    full_precision,
    integer_weights,
    step_of,
)
from saqcli.quant.quantizers.base import Quantizer
from saqcli.quant.quantizers.ranges import round_to_range, scale_gradient, values_per_image
from saqcli.quant.short_steps.rounding import short_step


class _Asymmetric(Quantizer):
    """A learned step, and the lowest code of the range; the grids given have the number of codes, and its start.

    Attributes:
        step_size: trainable, ``(len(candidates), *shape)``, in units of the tensor; its sign does not matter.
        lowest_code: buffer of whole numbers, int16, in the same shape.
    """

    lowest_code: Tensor

    def __init__(self, grids: Mapping[int, AnyGrid], shape: tuple[int, ...] = ()) -> None:
        super().__init__(grids, shape)
        ones = torch.ones(len(self.candidates), *shape)
        highest, lowest = (
            torch.tensor(ends).view(-1, *(1,) * len(shape))
            for ends in zip(*((float(g.highest), float(g.lowest)) for g in self.grids.values()), strict=True)
        )
        self.step_size = nn.Parameter(ones / highest)
        self.register_buffer("lowest_code", (ones * lowest).to(torch.int16))

    @property
    def top(self) -> int:
        """The highest code, counted from the lowest."""
        return self.grids[self.bits].levels - 1

    def step(self) -> Tensor:
        """The active step, differentiable."""
        return short_step(self.step_size[self._active].abs().clamp_min(TINY), self.step_bits)

    def largest_code(self) -> float:
        """The largest one that a lowest code allows."""
        return float(self.top)

    def lowest(self) -> Tensor:
        """The lowest codes of the active candidate, as numbers in the dtype of the step."""
        return self.lowest_code[self._active].clamp(-self.top, 0).to(self.step_size.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` clamped to the range and rounded."""
        x = full_precision(x)
        step = scale_gradient(self.step(), self.values_per_step(x), self.top)
        return round_to_range(x, step, step * self.lowest(), self.top, self.kernel)

    def values_per_step(self, x: Tensor) -> float:
        """Number of values of ``x`` that share a step."""
        return x.numel() / max(1, self.step_size[self._active].numel())


class AsymmetricWeight(_Asymmetric):
    """Weights: a step and a lowest code per output channel, or one of both per tensor."""

    weight_grids: ClassVar[tuple[WeightGrid, ...]] = ("auto",)

    @classmethod
    def weight_grid(cls, bits: int, kind: WeightGrid) -> AnyGrid:
        """The signed grid, from which the search begins."""
        return integer_weights(bits)

    def grid(self) -> ShiftedGrid:
        """The active codes."""
        return ShiftedGrid(self.lowest(), self.top)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Steps and lowest codes of least error on ``x``, for every candidate."""
        for k, (bits, grid) in enumerate(self.grids.items()):
            if grid.levels == 2**bits:
                step, lowest = best_ranges(x, grid.levels - 1, self.shape, self.error_power)
                self._set(k, step, lowest)
            else:  # symmetric
                self._fit_signed(k, x, grid)

    def fits(self) -> tuple[Callable[[Tensor], None], ...]:
        """Also without a shift."""
        return self.fit, self.fit_signed

    @torch.no_grad()
    def fit_signed(self, x: Tensor) -> None:
        """Steps of least error on the signed grid, for every candidate."""
        for k, grid in enumerate(self.grids.values()):
            self._fit_signed(k, x, grid)

    def _fit_signed(self, k: int, x: Tensor, grid: AnyGrid) -> None:
        step = step_of(best_level(x, grid, self.shape, self.error_power), grid)
        self._set(k, step, torch.full_like(step, float(grid.lowest)))

    def _set(self, k: int, step: Tensor, lowest: Tensor) -> None:
        self.step_size[k] = step
        self.lowest_code[k] = lowest.to(torch.int16)


class AsymmetricActivation(_Asymmetric):
    """Inputs of a layer: one step, one lowest code."""

    def grid(self) -> Grid:
        """The active codes."""
        lowest = int(self.lowest())
        return Grid(lowest, lowest + self.top, 1)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Step and lowest code of least error on ``x``, for every candidate."""
        for k, grid in enumerate(self.grids.values()):
            step, lowest = best_range(x.detach().float(), grid.levels - 1, self.error_power)
            self.step_size[k], self.lowest_code[k] = step, lowest

    def values_per_step(self, x: Tensor) -> float:
        """Number of values per image, as in LSQ."""
        return values_per_image(x)
